"""Progress bars with tqdm, on terminals and in notebooks."""

import sys
import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # notebooks without ipywidgets have text for bars
    from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


class Progress:
    """One bar a stage.  Called with (stage, done, total); a context that clears the bar at its end."""

    def __init__(self, shown=None):
        if shown is None:
            shown = issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()
        self._shown, self._bar = shown, None

    def __call__(self, stage, done, total):
        if not self._shown:
            return
        if self._bar is None or self._bar.desc != f"{stage}: ":
            self.close()
            self._bar = tqdm(desc=stage, total=total, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self):
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

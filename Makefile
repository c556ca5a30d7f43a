# Everything a newcomer or CI needs; each target does its own set-up.
#   make demo      the main job: what is installed, proof, a benchmark, the calculator trained and asked
#   make test      the whole test suite, with short forms of sanitize, planted and gate
#   make check     its fast part
#   make planted   every planted bug, of which make test plants every eighth
#   make lint      ruff and clang-format         make format    the same, mending
#   make sanitize  the long form of the sanitizer and emulator-seed runs
#   make bench     every benchmark of this machine's CPU, into benchmarks/results/ and README.md's table
#   make report    those results as report.html
#   make gate      compiles every kernel for every GPU and inspects it, into benchmarks/results/kernels.md
#   make gpu       on a machine with a GPU, with its own python: build, probe, test, benchmark

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Of the planted bugs every PLANTED-th; a worker a core. Threads that wait must sleep: those of another worker need the core.
PLANTED := 8
PYTEST = FASTPRIMER_PLANTED=$(PLANTED) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope -p no:benchmark
# Beside a torch without CUDA the kernels for GPUs are compiled and linked for one GPU, which proves that they are (the gate of `make test`
# compiles them for all); they cannot be called there.
ONE_GPU = -c "import torch; print('' if torch.version.cuda else '-DFASTPRIMER_CUDA_ARCHITECTURES=90a')"
SOURCES := $(wildcard setup.py pyproject.toml CMakeLists.txt constraints.txt csrc/*.* csrc/*/*.* tests/emulator/*.*)

.PHONY: demo test check planted lint format sanitize bench report gate gpu clean

demo: $(READY)
	$(BIN)/fastprimer doctor
	$(BIN)/fastprimer verify
	$(BIN)/fastprimer bench --quick --dtype float32
	$(BIN)/fastprimer train calculator --out runs/demo
	$(BIN)/fastprimer generate --model runs/demo "two plus three equals"

test: $(READY)
	$(PYTEST)

check: $(READY)
	$(PYTEST) -m "not slow"

planted: PLANTED := 1
planted: $(READY)
	$(PYTEST) -k "planted or interpreter"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' 'tests/emulator/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/emulator/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

sanitize: $(READY)
	PYTHONPATH=tests $(BIN)/python -m emulator.sanitize --seeds 20

bench: $(READY)
	CUDA_VISIBLE_DEVICES= $(BIN)/fastprimer bench --out benchmarks/results/cpu.json
	CUDA_VISIBLE_DEVICES= $(BIN)/fastprimer bench --growth --out benchmarks/results/growth-cpu.json
	$(BIN)/fastprimer report --results benchmarks/results/cpu.json $(wildcard benchmarks/results/nvidia-*.json) --readme README.md

report: $(READY)
	$(BIN)/fastprimer report --out report.html

gate: $(READY)
	PYTHONPATH=tests $(BIN)/python -m aot > kernels.md.part
	mv kernels.md.part benchmarks/results/kernels.md

# The machine's own python has torch with CUDA; nothing is downloaded.
gpu:
	PYTHON="$(PYTHON)" sh benchmarks/gpu.sh

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy "setuptools>=64" "cmake>=3.24" ninja pybind11
	CMAKE_ARGS="$${CMAKE_ARGS-$$($(BIN)/python $(ONE_GPU))}" $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build dist $(VENV) fastprimer/*.so fastprimer/_native.json

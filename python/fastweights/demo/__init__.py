"""The main job on a real model, start to end: `make demo`, and with its controls `make report`."""

"""YAML groups: mini worlds, presets, suites, runtimes and trackers."""

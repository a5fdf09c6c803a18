"""Where Hydra looks for plugins: the sweeper and the launchers of quasar.experiment.sweep."""

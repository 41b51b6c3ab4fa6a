"""Starting the processes of a run. A worker gets the run folder with its frozen config, and nothing else."""

"""What a run leaves on disk: its folder, the adapter and its lineage, the merged model."""

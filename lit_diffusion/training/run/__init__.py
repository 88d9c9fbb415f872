"""What a run writes: folder, metrics, checkpoints, measurements, dashboards."""

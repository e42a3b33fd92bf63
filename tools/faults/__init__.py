"""What tools/chaos.py does to a small training job: kills, cut saves, damaged checkpoints, a long run with faults."""

"""What tests share and users may want: random checkpoints, and what "equal" means."""

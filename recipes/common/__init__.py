"""What the recipes share. It knows nothing of any paper."""

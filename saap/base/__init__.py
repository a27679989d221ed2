"""What every package uses: files, control groups, /proc and /sys. No package of ours is imported here."""

"""What every package stands on: errors, files, documents, options, child processes; no torch, nothing else of ours."""

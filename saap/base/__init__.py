"""The base of every package: errors, files, documents, options, child processes; no torch, nothing else of ours."""

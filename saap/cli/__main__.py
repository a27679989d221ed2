"""``python -m saap.cli``, such as ``accelerate launch -m saap.cli prune ...``."""

from saap.cli.main import main

main()

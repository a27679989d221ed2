"""``python -m saap.cli``, such as ``accelerate launch -m saap.cli tune ...``."""

from saap.cli.main import main

main()

"""`python -m lora_jax.cli`, where `lora-jax` is not on the PATH."""

import sys

from lora_jax.cli import main

sys.exit(main())

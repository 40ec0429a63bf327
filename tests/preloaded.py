"""What processes of tests find imported."""

from ee_megatron.training.launch import import_ahead

import_ahead()

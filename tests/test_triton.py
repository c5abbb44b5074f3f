"""What only the Triton backend must show: every edge of its tiles, and how it is chosen and refused."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from judge import assert_as_exact_as_the_reference
from problems import EVERY, FORMS, cases, random_problem

"""Tests compile thousands of small programs and run each a few times: compile them quickly instead of well."""

import quick

quick.settle()

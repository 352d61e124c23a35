"""A base of 4 layers, two tasks, and a short training config over both."""

from short_runs import base_folder as base_folder
from short_runs import config as config
from short_runs import two_tasks as two_tasks

"""The short federation that the tests of this room begin with."""

from federation import base_folder, clients_folder, config, once, two_tasks

__all__ = ["base_folder", "clients_folder", "config", "once", "two_tasks"]

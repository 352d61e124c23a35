"""A real federation: keys, one server, clients on machines of their own, over Flower's network and TLS."""

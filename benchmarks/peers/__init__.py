"""The ways to call an object in another process that are compared. Each module has a class `Peer`; see `common.Peer`."""

"""A plugin with a C extension. It has never heard of miniplug."""

try:
    import peek  # made of peek.c
except ImportError:  # there is no C compiler: ctypes is a C extension, too, and does the same
    import ctypes

    class peek:
        @staticmethod
        def at(address: int) -> int:
            return ctypes.c_ubyte.from_address(address).value


class Native:
    def kind(self) -> str:
        return "compiled" if hasattr(peek, "__file__") else "ctypes"

    def at(self, address: int) -> int:
        """The byte at an address, if there is one."""
        return peek.at(address)

"""Steps that the processes of an MPI communicator take together, each of which holds its part of the state.

`Sharded` is the door, and its docstring has an example.
"""

try:
    from mpi4py import MPI as _MPI  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
    raise ImportError("adaptive_c.mpi needs mpi4py and an MPI library: pip install 'adaptive_c[mpi]'") from error

from ._sharded import Sharded

__all__ = ["Sharded"]

from ._baseline import Block as Block
from ._baseline import Plan as Plan
from ._baseline import ceiling as ceiling
from ._baseline import get_threads as get_threads
from ._baseline import openmp as openmp
from ._baseline import scale_limits as scale_limits
from ._baseline import set_threads as set_threads
from ._baseline import threads as threads

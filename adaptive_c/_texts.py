"""What every option is, in words, once for all optimizers; and every argument of a schedule.

`_docstrings` makes the parameters of each class from it; an entry with the name of a class is special to that class.
Range, allowed words and default come from the table of options and from the constructor; only where these don't say
it, the type is here, after a colon.
"""

OPTIONS = """
params : array, list or tuple of arrays, dict of arrays, or list of group dicts
    NumPy arrays of float32, float64, float16 or bfloat16, of any shape, C-contiguous and writable; memory maps are
    fine.  They are updated where they are.  A group dict has ``params`` and any options marked "per group" that differ
    from the arguments; all arrays of a group have one dtype.  float16 and bfloat16 need `master` or `rounding`.
options : dict
    The rule's own options, and their values.
lr
    The learning rate.  A schedule, here and below, is an object of `adaptive_c.schedules`, or any function of the
    number of applied steps: step k uses ``schedule(k - 1)``, and a skipped step does not advance it.
Rprop.lr, SuperSAB.lr
    The rate of every element at an array's first step.  It is not read again, and can't follow a schedule.
momentum
    The share of the momentum buffer that is kept from step to step.
dampening
    The share of the gradient that is left out of the momentum buffer.
weight_decay
    Coupled weight decay: g <- g + weight_decay p, the gradient of an L2 penalty.
AdamW.weight_decay, Lion.weight_decay
    Decoupled weight decay: p <- p (1 - lr weight_decay) before the step.
decoupled_weight_decay
    Whether weight_decay is decoupled, as in AdamW: p <- p (1 - lr weight_decay) before the step.
nesterov
    Nesterov's form of the step.  It needs momentum > 0 and no dampening.
maximize
    Go up, not down: the gradient is negated first.
betas
    The decay constants of two running averages: of the gradient, and of the quantity that it is divided by.
eps
    What is added to the denominator, so that nothing is divided by 0.
Adadelta.eps
    What is added to both averages before their roots are taken.
Adamax.eps
    What is added to the magnitude of the gradient, so that nothing is divided by 0.
AdaBelief.eps
    What is added to v, where it stays, and to the root of v.
eps_mode
    Where eps is added: "outside" the root, sqrt(v) + eps; "inside" it, sqrt(v + eps); or, "hat", to the root before
    the bias of v is corrected, (sqrt(v) + eps)/sqrt(1 - beta2^t).  Without a bias correction "hat" is "outside".
Lion.betas
    The shares that the momentum m keeps: in the sum whose sign is the step, and from step to step.
AdaBelief.betas
    The decay constants of two running averages: of the gradient, and of the square of its distance from the first one.
amsgrad
    Divide by the largest v so far.  A run can't begin to do so in the middle, since that takes another state array.
second_moment
    Whether there is one second moment for each element, or one for each row p[i].  A row has the mean of its g^2
    instead of g^2, in an array of shape (rows, 1, ...).  It can't be changed in the middle of a run.
lr_decay
    How the learning rate falls: step t has lr/(1 + (t - 1) lr_decay).
initial_accumulator_value
    What the sum of squares starts at.  It is read at an array's first step only.
Yogi.initial_accumulator_value
    What both moments start at.  It is read at an array's first step only.
alpha
    The decay constant of the running average of squared gradients.
rho
    The decay constant of both running averages.
centered
    Divide by an estimate of the standard deviation: the mean of the gradient is subtracted from it in the square.
momentum_decay
    How fast the schedule of the momentum rises.
etas
    The factors of an element's rate: where its gradient has changed its sign, and where it has kept it.
step_sizes
    The smallest and the largest rate of an element.
variant
    What happens where a sign has changed: "irprop-" makes no step, "rprop+" takes the last one back, and "rprop-" still
    makes the step.
eta_plus
    The factor of an element's rate while its gradient keeps its sign.
eta_minus
    The factor of an element's rate where its gradient has changed its sign.
max_rate
    The largest rate that an element can grow to.
n_threads : int in [1, 4096]
    The number of threads of a large step, used as given unless OMP_THREAD_LIMIT allows fewer.  None means the number
    given to ``set_num_threads``, else OMP_NUM_THREADS, else the smaller of CPU affinity and cgroup quota.
max_grad_norm
    Clip: gradients are multiplied by min(1, max_grad_norm/(norm + 1e-6)).  norm is the 2-norm over the unscaled
    gradients of all groups, unless norm_over says otherwise.  This reads the gradients once more, and does not write
    them.
norm_over
    Which gradients max_grad_norm clips together: "all" of them, as torch's ``clip_grad_norm_`` does; those of each
    "group"; or that of each "array" by itself, as thinc and Keras' clipnorm do.  A step is skipped or refused as a
    whole.
max_grad_value
    Clamp every element of the gradient to [-max_grad_value, max_grad_value], after unscaling and clipping.
on_nonfinite
    What to do with a step whose gradients hold a NaN or an infinity.  If the rule squares them, a number whose square
    overflows the dtype counts too, because it would make the second moment infinite forever.  (A sum of many squares,
    such as Adagrad's, can still overflow.)  "skip" counts the step in skipped_steps, and "raise" names the first such
    element.  Both leave parameters, state, average, copies and counts as they were.  A skipped step still zeroes the
    gradients if zero_grad asks for it.  None is "ignore"; with a dynamic loss_scale it is "skip", the only one allowed.
loss_scale : float > 0 or "dynamic"
    The number by which gradients are divided as they are read.  ``step(grads, loss_scale=s)`` sets it for a single
    step.  "dynamic" follows torch.amp.GradScaler: it starts at 65536, is halved after a step that was skipped, and
    doubled after 2000 steps in a row that were not.  Multiply the loss by ``opt.loss_scale``, which reads the current
    one; assigning a number continues from there.  It stays within [2**-126, 2**126]; torch's goes to 2**127 and 0.
zero_grad
    Zero the gradients after they are used, instead of a call like torch's zero_grad().  They must be writable and
    must not share memory.
cast
    Take gradients (and targets) as they come: any of float16, bfloat16, float32 and float64 for any parameters,
    C-contiguous or not, aligned or not, and a NumPy or Python float for an array of one element.  They are
    converted as they are read, 4,096 elements at a time in each thread, with the bits of
    ``np.ascontiguousarray(g.astype(dtype))``, dtype being float64 for float64 parameters and float32 for all
    others.  Integers, complex numbers and other byte orders are still refused.  Values of `Rows` may have any
    of the formats, but must be contiguous.
keep_undo : bool
    Before each step, keep what it overwrites, for `rollback`.  This takes as much memory again as parameters,
    state, averages and copies, and one more pass that copies them.
flush_denormals
    Treat denormal numbers as 0 in a step (FTZ and DAZ).  This changes bits.  The caller's floating-point mode never
    does: every thread computes in the default mode, or in this one, and the caller's mode is restored.
ema_decay
    Keep an average e of the parameters in `ema`.  It starts at the parameters; after each step of an array,
    e <- e + (1 - ema_decay) (p - e).
bounds : (lo, hi)
    Box constraint: parameters are clamped to it after each step.  Each side is a number, None, or arrays in the
    structure of the group's parameters.  Bounds are copied, and rounded inward to the parameters' dtype.
sum_to_one : bool, "divide" or "project"
    For arrays whose last axis is a distribution: after the bounds, "divide" (or True) divides each row of the last
    axis by its sum; a row whose sum is not positive and finite stays as it is.  "project" replaces each row by the
    nearest one of numbers >= 0 whose sum is 1 (Duchi et al. 2008), unless its sum is not finite.
rows
    What a gradient of `Rows` means for the other rows.  "lazy": nothing; they and their state stay as they are.
    "exact": a gradient of 0.  They are brought up to date, to the bits of dense steps, when they are stepped next
    or by `catch_up`, and all at once after each 4,096 steps, by a step that takes longer.  Refused for 8-bit state.
    It may be assigned, and then all rows catch up.
copy_to : array, or arrays in the structure of the group's parameters
    Arrays of float32, bfloat16 or float16 that receive the updated parameters, rounded to nearest even; they are
    written at construction too.  Only float32 for float64 parameters.
state_dtype
    The format of the moments.  "uint8" is a code of 8 bits with a scale for each block of 256 elements.  bfloat16
    and uint8 are rounded stochastically.  They are refused for float64 parameters, Rprop, SuperSAB and
    centered=True.  A block may contain elements of two arrays; then the larger second moments may lift the others,
    if those are 40,000 times smaller.
master
    For float16 and bfloat16 parameters: the rule works on a float32 copy, ``state["master"]``, and the parameters
    are that copy, rounded to nearest even, after each step.  If you write to the parameters yourself, write to the
    copy too, because the next step starts from it.
rounding
    For float16 and bfloat16 parameters without a copy: rounded up or down, with probabilities given by the
    distances, so that the mean is exact.
uint16_as : {"bfloat16"}
    What uint16 arrays hold: parameters, gradients and copy_to.  ml_dtypes.bfloat16 arrays do not need it.
seed : int in [0, 2**64)
    The seed of stochastic rounding, which is a function of seed, step, group and place, and the same for every
    number of threads.  Give optimizers that are averaged or compared different seeds.
state_path : str or path-like
    A folder in which the state lies: moments, scales, master copies and averages; None keeps it in memory.  It is
    streamed through memory while a step runs.  Each step is durable when it returns; after a kill or a power cut the
    folder holds the state of one whole step.  If the folder has a state already, the run goes on from it: counts,
    options and schedules become those of the folder, as with `load`.
state_memory : int > 0
    Bytes of memory for the buckets through which the state passes; None is 1 GiB.  State that fits stays in memory,
    but each step still writes it.
state_parameters : bool
    Keep the parameters in the folder too.  They are written into `params` when a run goes on from the folder, and put
    back after a step that fails on the disk.
"""

ARGUMENTS = """
*args, **arguments
    The fields of the class.
base
    The value at the first step.
constant.base, step.base, multistep.base
    The value, before anything has changed it.
inverse_sqrt.base, one_cycle.base
    The largest value, to which the first steps lead up.
plateau.base
    The value before it has fallen.
end
    The value at the end, which it keeps from then on.
steps : int >= 1
    The number of steps that the change takes.
step_size : int >= 1
    The number of steps between two changes.
gamma
    The factor of each change.
milestones : list of int >= 1
    The numbers of the steps at which something changes, ascending.
power
    The exponent; 1 is a straight line.
mult : int >= 1
    How many times as long each cycle is as the one before.
warmup_steps : int >= 1
    The number of steps that lead up to base.
pct_start
    The part of the steps that lead up to base.
anneal_strategy
    The form of each phase: half a period of a cosine, or a straight line.
div_factor
    The first value is base/div_factor.
final_div_factor
    The last value is base/div_factor/final_div_factor.
three_phase
    Fall back to the first value in as many steps as it rose, and only then to the last one.
factor
    The number by which the value is multiplied when the metric does not improve.
patience : int >= 0
    The number of metrics in a row that may be no improvement.
threshold
    By how much a metric must be better than the best one to be an improvement.
mode
    Whether a lower metric is better, or a higher one.
threshold_mode
    Whether threshold is a share of the best metric, or a difference from it.
cooldown : int >= 0
    The number of metrics that do not count after the value has fallen.
min
    The lowest value.
eps
    A change of the value by no more than this is not made.
value
    Its present value.  Leave it out when you make one, and the following three as well.
best
    The best metric so far.
num_bad_epochs : int >= 0
    The number of metrics in a row that were no improvement.
cooldown_counter : int >= 0
    The number of metrics that still do not count.
of : schedule or float
    The schedule that follows.  It begins at its own step 0.
start
    The value at step 0.
schedules : list of schedules or float
    The schedules in their order.  Each begins at its own step 0.
"""

TENSORS = """
params : iterable of tensors, of (name, tensor) pairs, or of group dicts
    As in torch: float32, float64, float16 or bfloat16, on the CPU, dense (of any strides without gaps).  They are
    updated where they are.  A group may mix dtypes.  float16 and bfloat16 need `master` or `rounding`.
lr
    The learning rate, a number or a tensor of one.  It is read from ``param_groups`` at every step, as all numbers are,
    so that torch's schedulers work, and checked when it has changed.
foreach : bool
    Accepted and ignored: there is one implementation.  What torch refuses of it is refused here too.
fused : bool
    Accepted and ignored: there is one implementation.  What torch refuses of it is refused here too.
capturable : bool
    True is refused.
differentiable : bool
    True is refused.
ema_decay
    Keep an average e of the parameters, ``state[p]["ema"]``; after each step, e <- e + (1 - ema_decay) (p - e).
    `averaged_parameters` puts the averages into the parameters' place.
bounds : (lo, hi)
    Two numbers or None: parameters are clamped to them after each step.
rows
    What a sparse gradient means for the other rows.  "lazy": nothing, they stay as they are.  "exact": a gradient
    of 0; they are brought up to date when they are stepped next, or by `catch_up`, which is also needed before
    ``model.state_dict()``.  A table waits for at most 4,096 steps: the one after them catches all rows up.
state_dtype
    The format of the moments, as a name or torch's dtype.  "uint8" is a code of 8 bits with a scale for each block
    of 256 elements.  Both narrow formats are rounded stochastically.  Refused for float64, Rprop and SuperSAB.
master
    For float16 and bfloat16: the rule works on a float32 copy, ``state[p]["master"]``, and the parameters are that
    copy, rounded.  The next step takes what you write to a parameter over into the copy, except what is written in
    place through ``p.data``, which torch does not count: call ``torch.autograd.graph.increment_version(p)``.
rounding
    For float16 and bfloat16 without a copy: rounded up or down so that the mean is exact.
max_grad_norm
    Clip the gradients of all groups to this 2-norm, as ``clip_grad_norm_`` would, without writing them.
norm_over
    Which gradients max_grad_norm clips together: "all" of them; those of one dtype in each "group"; or each
    tensor's by itself, "array".
on_nonfinite
    What to do with a step whose gradients hold a NaN or an infinity, or a number whose square overflows where the
    rule squares it.  "skip" counts it in `skipped_steps`, "raise" names the first such element; all else stays.
zero_grad
    Zero the gradients in the same sweep, instead of a call of ``zero_grad(set_to_none=False)``.
flush_denormals
    Treat denormal numbers as 0 in a step.
seed : int in [0, 2**64)
    The seed of stochastic rounding.
n_threads : int in [1, 4096]
    The number of threads of a large step; None leaves it to ``adaptive_c.set_num_threads``.  Where torch was
    imported first, both share one OpenMP runtime, and ``torch.set_num_threads`` caps these threads too.
"""

RULES = """
p : float, or array of any shape
    The parameter, a Python float, a NumPy scalar or a NumPy array.  It is not written.
g : float, or array of the shape of p
    Its gradient.  It is not written.
s : dict
    The state of the rule, by PyTorch's names where PyTorch has the rule.  An empty dict is the state before the first
    step; the new state is put into it.
t : int >= 1
    The number of the step.
lr
    The learning rate.
**options
    The other options of `adam`.
"""

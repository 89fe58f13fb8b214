# What the rules read: the hyperparameters as the user gave them, and the constants that a step forms from them.

cdef enum EpsMode:
    OUTSIDE, INSIDE, HAT

cdef enum Variant:
    IRPROP_MINUS, RPROP_PLUS, RPROP_MINUS

# The hyperparameters of all rules.  beta1 doubles as RMSprop's alpha and Adadelta's rho.  The numbers stand first, then
# the switches, each kind one after the other: FIELDS and SWITCHES say which of them an option sets.
cdef struct Options:
    double lr, weight_decay, eps, beta1, beta2, momentum, dampening, lr_decay, momentum_decay
    double eta_minus, eta_plus, step_min, step_max, ema_decay
    int eps_mode, variant, nesterov, maximize, amsgrad, centered, decoupled, exact, sum_to_one

cdef dict FIELDS = {"lr": 0, "weight_decay": 1, "eps": 2, "betas": 3, "alpha": 3, "rho": 3, "momentum": 5,
                    "dampening": 6, "lr_decay": 7, "momentum_decay": 8, "etas": 9, "eta_minus": 9, "eta_plus": 10,
                    "step_sizes": 11, "max_rate": 12, "ema_decay": 13}  # of a pair the first
cdef dict SWITCHES = {"eps_mode": 0, "variant": 1, "nesterov": 2, "maximize": 3, "amsgrad": 4, "centered": 5,
                      "decoupled_weight_decay": 6, "rows": 7, "sum_to_one": 8}
cdef dict WORDS = {"outside": OUTSIDE, "inside": INSIDE, "hat": HAT,
                   "irprop-": IRPROP_MINUS, "rprop+": RPROP_PLUS, "rprop-": RPROP_MINUS, "lazy": False, "exact": True,
                   "divide": 1, "project": 2}

# What a loop reads: the constants of one step of one array.
cdef struct Step:
    double lr               # the step size, bias corrections included
    double decay            # 1 - lr*weight_decay, or 1
    double b1, c1, b2, c2   # the decay constants b and c = 1 - b
    double v_scale, e_in, e_out  # the denominator sqrt(v*v_scale + e_in) + e_out
    double mu, mu_next, product, g_scale  # momentum; NAdam's schedule
    double up, down, lo, hi  # Rprop's and SuperSAB's rates
    bint first              # whether this is the first step of the array, which has no state yet
    bint by_row             # whether each row of the array has one second moment
    bint rectified          # whether this step divides by the root; only RAdam has steps that do not

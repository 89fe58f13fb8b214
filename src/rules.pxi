# The update rules, in the order of reference.py.  Each has its formula, a function that forms the constants of one step
# of one array in double, and a loop over n contiguous elements.  A loop knows pointers, n and its constants, and
# nothing about threads, chunks, formats or the options that other stages carry out.
#
# gcc vectorises every loop by itself, because each is a plain counted loop with at most five pointers of one type (ten
# alias checks) and no branches, only selections (`x if c else y`).  A variant that costs an array or an operation is
# chosen by a constant argument of an inline loop, so that each variant is compiled to a loop of its own.  The order of
# the operations is that of reference.py, so that the results have the same bits.
#
#   p   (n,) the parameters, updated in place      k   the constants, rounded to p's type as they are loaded
#   g   (n,) the gradient, read only               s   the rule's state arrays, each (n,), updated in place

cdef enum Rule:
    SGD, MOMENTUM, ADAGRAD, RMSPROP, ADADELTA, ADAM, ADAMAX, NADAM, RADAM, YOGI, ADABELIEF, LION, RPROP, SUPERSAB

cdef dict RULES = {"sgd": SGD, "momentum": MOMENTUM, "adagrad": ADAGRAD, "rmsprop": RMSPROP, "adadelta": ADADELTA,
                   "adam": ADAM, "adamax": ADAMAX, "nadam": NADAM, "radam": RADAM, "yogi": YOGI,
                   "adabelief": ADABELIEF, "lion": LION, "rprop": RPROP, "supersab": SUPERSAB}


cdef inline signed char stored_sign(floating s) noexcept nogil:
    return <signed char> <int> (s if s == s else <floating> 0)


cdef void denominator(const Options* o, double bc2, Step* k) noexcept nogil:
    """The constants of one form that covers every convention of eps; bc2 = 1 - beta2^t corrects the bias of v."""
    k.v_scale = 1 / bc2
    k.e_in = o.eps if o.eps_mode == INSIDE else 0
    k.e_out = o.eps if o.eps_mode == OUTSIDE else (o.eps / sqrt(bc2) if o.eps_mode == HAT else 0)


# SGD -- Robbins & Monro 1951; momentum as in PyTorch, with the learning rate outside the buffer.
#   p <- p - lr g          or          b <- mu b + (1 - dampening) g, at the first step b <- g
#                                      p <- p - lr b, nesterov: p <- p - lr (g + mu b)
cdef void sgd_step(const Options* o, Step* k) noexcept nogil:
    k.lr, k.mu, k.c1 = o.lr, o.momentum, 1 - o.dampening

cdef void sgd_plain(Py_ssize_t n, floating* p, const floating* g, const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating lr = <floating> k.lr
    for i in range(n):
        p[i] = p[i] - lr * g[i]

cdef inline void sgd_loop(Py_ssize_t n, floating* p, const floating* g, floating* b, const Step* k,
                          bint first, bint nesterov) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating pi, bi, lr = <floating> k.lr, mu = <floating> k.mu, c1 = <floating> k.c1
    for i in range(n):
        pi = p[i]
        bi = g[i] if first else mu * b[i] + c1 * g[i]
        b[i] = bi
        p[i] = pi - lr * (g[i] + mu * bi if nesterov else bi)

cdef void sgd(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o, const Step* k) noexcept nogil:
    cdef floating* b = <floating*> s[0]
    if o.momentum == 0:
        sgd_plain(n, p, g, k)
    elif k.first:
        if o.nesterov:
            sgd_loop(n, p, g, b, k, True, True)
        else:
            sgd_loop(n, p, g, b, k, True, False)
    elif o.nesterov:
        sgd_loop(n, p, g, b, k, False, True)
    else:
        sgd_loop(n, p, g, b, k, False, False)


# Momentum -- Polyak 1964; Sutskever, Martens, Dahl & Hinton 2013, with the learning rate inside the velocity.
#   v <- mu v + lr g       p <- p - v, nesterov: p <- p - (mu v + lr g)
cdef void momentum_step(const Options* o, Step* k) noexcept nogil:
    k.lr, k.mu = o.lr, o.momentum

cdef inline void momentum_loop(Py_ssize_t n, floating* p, const floating* g, floating* v, const Step* k,
                               bint nesterov) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating vi, lr = <floating> k.lr, mu = <floating> k.mu
    for i in range(n):
        vi = mu * v[i] + lr * g[i]
        p[i] = p[i] - (mu * vi + lr * g[i] if nesterov else vi)
        v[i] = vi

cdef void momentum(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                   const Step* k) noexcept nogil:
    if o.nesterov:
        momentum_loop(n, p, g, <floating*> s[0], k, True)
    else:
        momentum_loop(n, p, g, <floating*> s[0], k, False)


# Adagrad -- Duchi, Hazan & Singer 2011.
#   v <- v + g^2           p <- p - lr/(1 + (t - 1) lr_decay) g / (sqrt(v + e_in) + e_out)
cdef void adagrad_step(const Options* o, long long t, Step* k) noexcept nogil:
    k.lr = o.lr / (1 + (t - 1) * o.lr_decay)
    denominator(o, 1, k)

cdef void adagrad(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                  const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* v = <floating*> s[0]
    cdef floating vi, lr = <floating> k.lr, e_in = <floating> k.e_in, e_out = <floating> k.e_out
    for i in range(n):
        vi = v[i] + g[i] * g[i]
        p[i] = p[i] - lr * g[i] / (root(vi + e_in) + e_out)
        v[i] = vi


# RMSprop -- Tieleman & Hinton 2012; centered: Graves 2013, equations 38 to 45.
#   v <- alpha v + (1 - alpha) g^2        centered: a <- alpha a + (1 - alpha) g, and v - a^2 instead of v below
#   p <- p - lr g / (sqrt(v + e_in) + e_out), momentum: b <- mu b + g / (...), p <- p - lr b
cdef void rmsprop_step(const Options* o, Step* k) noexcept nogil:
    k.lr, k.mu, k.b2, k.c2 = o.lr, o.momentum, o.beta1, 1 - o.beta1
    denominator(o, 1, k)

cdef inline void rmsprop_loop(Py_ssize_t n, floating* p, const floating* g, floating* v, floating* b, floating* a,
                              const Step* k, bint momentum, bint centered) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating vi, wi, bi, ai, lr = <floating> k.lr, mu = <floating> k.mu, b2 = <floating> k.b2, c2 = <floating> k.c2
    cdef floating e_in = <floating> k.e_in, e_out = <floating> k.e_out
    for i in range(n):
        vi = b2 * v[i] + c2 * g[i] * g[i]
        wi = vi
        if centered:
            ai = b2 * a[i] + c2 * g[i]
            a[i] = ai
            wi = vi - ai * ai
            wi = <floating> 0 if wi < 0 else wi
        if momentum:
            bi = mu * b[i] + g[i] / (root(wi + e_in) + e_out)
            b[i] = bi
            p[i] = p[i] - lr * bi
        else:
            p[i] = p[i] - lr * g[i] / (root(wi + e_in) + e_out)
        v[i] = vi

cdef void rmsprop(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                  const Step* k) noexcept nogil:
    cdef floating* v = <floating*> s[0]
    cdef floating* b = <floating*> s[1]
    cdef floating* a = <floating*> s[2]
    if o.momentum == 0:
        if o.centered:
            rmsprop_loop(n, p, g, v, b, a, k, False, True)
        else:
            rmsprop_loop(n, p, g, v, b, a, k, False, False)
    elif o.centered:
        rmsprop_loop(n, p, g, v, b, a, k, True, True)
    else:
        rmsprop_loop(n, p, g, v, b, a, k, True, False)


# Adadelta -- Zeiler 2012, Algorithm 1.
#   v <- rho v + (1 - rho) g^2            d = sqrt(u + eps) / sqrt(v + eps) g
#   u <- rho u + (1 - rho) d^2            p <- p - lr d
cdef void adadelta_step(const Options* o, Step* k) noexcept nogil:
    k.lr, k.b2, k.c2, k.e_in = o.lr, o.beta1, 1 - o.beta1, o.eps

cdef void adadelta(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                   const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* v = <floating*> s[0]
    cdef floating* u = <floating*> s[1]
    cdef floating vi, d, lr = <floating> k.lr, b2 = <floating> k.b2, c2 = <floating> k.c2, eps = <floating> k.e_in
    for i in range(n):
        vi = b2 * v[i] + c2 * g[i] * g[i]
        d = root(u[i] + eps) / root(vi + eps) * g[i]
        v[i] = vi
        u[i] = b2 * u[i] + c2 * d * d
        p[i] = p[i] - lr * d


# Adam -- Kingma & Ba 2015, Algorithm 1.  AdamW -- Loshchilov & Hutter 2019.  AMSGrad -- Reddi, Kale & Kumar 2018.
#   m <- b1 m + (1 - b1) g                v <- b2 v + (1 - b2) g^2            amsgrad: v^ <- max(v^, v)
#   p <- decay p - lr/(1 - b1^t) m / (sqrt(v/(1 - b2^t) + e_in) + e_out)      with v^ for v
cdef void moments_step(const Options* o, long long t, Step* k) noexcept nogil:  # what the rules with two moments share
    k.b1, k.c1, k.b2, k.c2 = o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2
    k.decay = 1 - o.lr * o.weight_decay if o.decoupled else 1
    k.lr = o.lr / (1 - power(o.beta1, t))
    denominator(o, 1 - power(o.beta2, t), k)
    k.rectified = True

cdef inline void adam_loop(Py_ssize_t n, floating* p, const floating* g, floating* m, floating* v, floating* x,
                           const Step* k, bint amsgrad, bint rectified) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating mi, vi, xi, lr = <floating> k.lr, decay = <floating> k.decay
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1, b2 = <floating> k.b2, c2 = <floating> k.c2
    cdef floating v_scale = <floating> k.v_scale, e_in = <floating> k.e_in, e_out = <floating> k.e_out
    for i in range(n):
        mi = b1 * m[i] + c1 * g[i]
        vi = b2 * v[i] + c2 * g[i] * g[i]
        xi = vi
        if amsgrad:
            xi = x[i] if vi <= x[i] else vi
            x[i] = xi
        if rectified:
            p[i] = p[i] * decay - lr * mi / (root(xi * v_scale + e_in) + e_out)
        else:
            p[i] = p[i] * decay - lr * mi
        m[i] = mi
        v[i] = vi

cdef void adam(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o, const Step* k) noexcept nogil:
    cdef floating* m = <floating*> s[0]
    cdef floating* v = <floating*> s[1]
    cdef floating* x = <floating*> s[2]
    if o.amsgrad:
        adam_loop(n, p, g, m, v, x, k, True, True)
    elif k.rectified:
        adam_loop(n, p, g, m, v, x, k, False, True)
    else:
        adam_loop(n, p, g, m, v, x, k, False, False)


# Adamax -- Kingma & Ba 2015, Algorithm 2, with eps inside the maximum (PyTorch).
#   m <- b1 m + (1 - b1) g                u <- max(b2 u, |g| + eps)           p <- p - lr/(1 - b1^t) m / u
cdef void adamax_step(const Options* o, long long t, Step* k) noexcept nogil:
    k.b1, k.c1, k.b2, k.e_in = o.beta1, 1 - o.beta1, o.beta2, o.eps
    k.lr = o.lr / (1 - power(o.beta1, t))

cdef void adamax(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                 const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* m = <floating*> s[0]
    cdef floating* u = <floating*> s[1]
    cdef floating mi, ui, ai, lr = <floating> k.lr, eps = <floating> k.e_in
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1, b2 = <floating> k.b2
    for i in range(n):
        mi = b1 * m[i] + c1 * g[i]
        ui = b2 * u[i]
        ai = (-g[i] if g[i] < 0 else g[i]) + eps
        ui = ui if ai <= ui else ai
        p[i] = p[i] - lr * mi / ui
        m[i] = mi
        u[i] = ui


# NAdam -- Dozat 2016, with PyTorch's schedule of the momentum.
#   m, v as in Adam       mu_t = b1 (1 - 0.96^(t psi) / 2)       P_t = mu_1 mu_2 ... mu_t
#   p <- decay p - lr (mu_t+1/(1 - P_t+1) m + (1 - mu_t)/(1 - P_t) g) / (sqrt(v/(1 - b2^t) + e_in) + e_out)
cdef double nadam_mu(const Options* o, long long t) noexcept nogil:
    return o.beta1 * (1 - 0.5 * power_of_096(t * o.momentum_decay))

cdef double nadam_product(const Options* o, long long t) noexcept nogil:
    """P_t of the definition.  The loop ends after at most some 60,000 rounds.

    mu becomes b1 where 0.96^(t psi) vanishes, at t psi = 900.  With a small psi, where that is far away, the factors
    stay well below 1 for so long that the product vanishes before.
    """
    cdef long long i
    cdef double mu, product = 1
    for i in range(1, t + 1):
        mu = nadam_mu(o, i)
        if mu == o.beta1:
            product *= power(mu, t - i + 1)
            break
        product *= mu
        if product < 1e-300:
            break
    return product if product >= 1e-300 else 0  # 1 - product has long been 1

cdef void nadam_step(const Options* o, long long t, double product, Step* k) noexcept nogil:
    cdef double mu = nadam_mu(o, t), mu_next = nadam_mu(o, t + 1)
    moments_step(o, t, k)
    k.product = product * mu
    k.lr = o.lr * mu_next / (1 - k.product * mu_next)
    k.g_scale = o.lr * (1 - mu) / (1 - k.product)

cdef void nadam(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o, const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* m = <floating*> s[0]
    cdef floating* v = <floating*> s[1]
    cdef floating mi, vi, lr = <floating> k.lr, g_scale = <floating> k.g_scale, decay = <floating> k.decay
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1, b2 = <floating> k.b2, c2 = <floating> k.c2
    cdef floating v_scale = <floating> k.v_scale, e_in = <floating> k.e_in, e_out = <floating> k.e_out
    for i in range(n):
        mi = b1 * m[i] + c1 * g[i]
        vi = b2 * v[i] + c2 * g[i] * g[i]
        p[i] = p[i] * decay - (lr * mi + g_scale * g[i]) / (root(vi * v_scale + e_in) + e_out)
        m[i] = mi
        v[i] = vi


# RAdam -- Liu et al. 2020, Algorithm 2, rectified once rho_t > 5, as in PyTorch.  The loop is Adam's.
#   rho_inf = 2/(1 - b2) - 1               rho_t = rho_inf - 2 t b2^t / (1 - b2^t)
#   rho_t > 5: Adam's step times sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))
#   otherwise: p <- decay p - lr/(1 - b1^t) m
cdef void radam_step(const Options* o, long long t, Step* k) noexcept nogil:
    cdef double b2_t = power(o.beta2, t), rho_inf = 2 / (1 - o.beta2) - 1
    cdef double rho = rho_inf - 2.0 * t * b2_t / (1 - b2_t)
    moments_step(o, t, k)
    k.rectified = rho > 5
    if k.rectified:
        k.lr = k.lr * sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


# Yogi -- Zaheer, Reddi, Sachan, Kale & Kumar 2018.  The constants are Adam's.
#   m as in Adam                          v <- v - (1 - b2) sign(v - g^2) g^2
#   p <- decay p - lr/(1 - b1^t) m / (sqrt(v/(1 - b2^t) + e_in) + e_out)
# v stays at 0 or above: it falls only where it is larger than g^2, and then by at most g^2, in rounded numbers too.
cdef void yogi(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o, const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* m = <floating*> s[0]
    cdef floating* v = <floating*> s[1]
    cdef floating mi, vi, q, lr = <floating> k.lr, decay = <floating> k.decay
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1, c2 = <floating> k.c2
    cdef floating v_scale = <floating> k.v_scale, e_in = <floating> k.e_in, e_out = <floating> k.e_out
    for i in range(n):
        mi = b1 * m[i] + c1 * g[i]
        q = g[i] * g[i]
        vi = v[i] - c2 * sign(v[i] - q) * q
        p[i] = p[i] * decay - lr * mi / (root(vi * v_scale + e_in) + e_out)
        m[i] = mi
        v[i] = vi


# AdaBelief -- Zhuang et al. 2020, Algorithm 2.  The constants are Adam's, but for eps, which stands in two places.
#   m as in Adam                          v <- b2 v + (1 - b2) (g - m)^2 + eps
#   p <- decay p - lr/(1 - b1^t) m / (sqrt(v/(1 - b2^t)) + eps)
cdef void adabelief_step(const Options* o, long long t, Step* k) noexcept nogil:
    moments_step(o, t, k)
    k.e_in = k.e_out = o.eps

cdef void adabelief(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                    const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* m = <floating*> s[0]
    cdef floating* v = <floating*> s[1]
    cdef floating mi, vi, d, lr = <floating> k.lr, decay = <floating> k.decay, v_scale = <floating> k.v_scale
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1, b2 = <floating> k.b2, c2 = <floating> k.c2
    cdef floating e_in = <floating> k.e_in, e_out = <floating> k.e_out
    for i in range(n):
        mi = b1 * m[i] + c1 * g[i]
        d = g[i] - mi
        vi = b2 * v[i] + c2 * d * d + e_in
        p[i] = p[i] * decay - lr * mi / (root(vi * v_scale) + e_out)
        m[i] = mi
        v[i] = vi


# Lion -- Chen et al. 2023, Algorithm 2.
#   p <- decay p - lr sign(b1 m + (1 - b1) g)                     m <- b2 m + (1 - b2) g
cdef void lion_step(const Options* o, Step* k) noexcept nogil:
    k.b1, k.c1, k.b2, k.c2 = o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2
    k.lr, k.decay = o.lr, 1 - o.lr * o.weight_decay

cdef void lion(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o, const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* m = <floating*> s[0]
    cdef floating mi, lr = <floating> k.lr, decay = <floating> k.decay
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1, b2 = <floating> k.b2, c2 = <floating> k.c2
    for i in range(n):
        mi = m[i]
        m[i] = b2 * mi + c2 * g[i]
        p[i] = p[i] * decay - lr * sign(b1 * mi + c1 * g[i])


# Rprop -- Riedmiller & Braun 1993 (rprop+); Igel & Huesken 2003 (irprop-, rprop-).
#   w = sign(g) q, where q is the sign kept from the last step   e <- clamp(e * (up if w > 0, down if w < 0, else 1))
#   irprop-, rprop+: where w < 0 the new q is 0       p <- p - e sign(g), irprop-: p <- p - e q
#   rprop+: where w < 0 the last step is undone, p <- p + e_old q_old
cdef void rates_step(const Options* o, Step* k) noexcept nogil:  # shared by Rprop and SuperSAB
    k.lr, k.mu = o.lr, o.momentum
    k.down, k.up, k.lo, k.hi = o.eta_minus, o.eta_plus, o.step_min, o.step_max

cdef inline void rprop_loop(Py_ssize_t n, floating* p, const floating* g, floating* e, signed char* q, const Step* k,
                            Variant variant) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating now, w, ei, undo, up = <floating> k.up, down = <floating> k.down
    cdef floating lo = <floating> k.lo, hi = <floating> k.hi
    for i in range(n):
        now = sign(g[i])
        w = now * q[i]
        undo = e[i] * q[i]
        ei = up * e[i] if w > 0 else (down * e[i] if w < 0 else e[i])
        ei = lo if ei < lo else ei
        ei = hi if ei > hi else ei
        if variant != RPROP_MINUS:
            now = <floating> 0 if w < 0 else now
        if variant == RPROP_PLUS:
            p[i] = p[i] + (undo if w < 0 else -(ei * now))
        else:
            p[i] = p[i] - ei * now
        e[i] = ei
        q[i] = stored_sign(now)

cdef void rprop(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o, const Step* k) noexcept nogil:
    cdef floating* e = <floating*> s[0]
    cdef signed char* q = <signed char*> s[1]
    if k.first:
        fill(n, e, k.lr)
    if o.variant == IRPROP_MINUS:
        rprop_loop(n, p, g, e, q, k, IRPROP_MINUS)
    elif o.variant == RPROP_PLUS:
        rprop_loop(n, p, g, e, q, k, RPROP_PLUS)
    else:
        rprop_loop(n, p, g, e, q, k, RPROP_MINUS)


# SuperSAB -- Tollenaere 1990.  w and q as in Rprop+.
#   w >= 0: e <- min(up e, hi) where w > 0, v <- mu v - e g, p <- p + v
#   w < 0:  p <- p - v (the last step is retracted), e <- down e, v <- 0
cdef void supersab(Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                   const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating* e = <floating*> s[0]
    cdef signed char* q = <signed char*> s[1]
    cdef floating* v = <floating*> s[2]
    cdef floating now, w, ei, vi, faster, slower, ahead, up = <floating> k.up, down = <floating> k.down
    cdef floating hi = <floating> k.hi, mu = <floating> k.mu
    if k.first:
        fill(n, e, k.lr)
    for i in range(n):
        now = sign(g[i])
        w = now * q[i]
        faster = up * e[i]
        faster = hi if faster > hi else faster
        slower = down * e[i]
        ei = faster if w > 0 else (slower if w < 0 else e[i])
        vi = v[i]
        ahead = mu * vi - ei * g[i]
        p[i] = p[i] + (-vi if w < 0 else ahead)
        v[i] = <floating> 0 if w < 0 else ahead
        e[i] = ei
        now = <floating> 0 if w < 0 else now
        q[i] = stored_sign(now)


cdef void form_step(Rule rule, const Options* o, long long t, bint first, double product, Step* k) noexcept nogil:
    """The constants of step number t of one array."""
    k.first = first
    k.product = product
    if rule == SGD:
        sgd_step(o, k)
    elif rule == MOMENTUM:
        momentum_step(o, k)
    elif rule == ADAGRAD:
        adagrad_step(o, t, k)
    elif rule == RMSPROP:
        rmsprop_step(o, k)
    elif rule == ADADELTA:
        adadelta_step(o, k)
    elif rule == ADAM or rule == YOGI:
        moments_step(o, t, k)
    elif rule == ADAMAX:
        adamax_step(o, t, k)
    elif rule == NADAM:
        nadam_step(o, t, product, k)
    elif rule == RADAM:
        radam_step(o, t, k)
    elif rule == ADABELIEF:
        adabelief_step(o, t, k)
    elif rule == LION:
        lion_step(o, k)
    elif rule == RPROP or rule == SUPERSAB:
        rates_step(o, k)


cdef void apply_rule(Rule rule, Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                     const Step* k) noexcept nogil:
    if rule == SGD:
        sgd(n, p, g, s, o, k)
    elif rule == MOMENTUM:
        momentum(n, p, g, s, o, k)
    elif rule == ADAGRAD:
        adagrad(n, p, g, s, o, k)
    elif rule == RMSPROP:
        rmsprop(n, p, g, s, o, k)
    elif rule == ADADELTA:
        adadelta(n, p, g, s, o, k)
    elif rule == ADAM or rule == RADAM:
        adam(n, p, g, s, o, k)
    elif rule == ADAMAX:
        adamax(n, p, g, s, o, k)
    elif rule == NADAM:
        nadam(n, p, g, s, o, k)
    elif rule == YOGI:
        yogi(n, p, g, s, o, k)
    elif rule == ADABELIEF:
        adabelief(n, p, g, s, o, k)
    elif rule == LION:
        lion(n, p, g, s, o, k)
    elif rule == RPROP:
        rprop(n, p, g, s, o, k)
    elif rule == SUPERSAB:
        supersab(n, p, g, s, o, k)


cdef bint writes_state(Rule rule, const Options* o) noexcept nogil:
    """Does a step with these options leave state for the next one?"""
    return rule != SGD or o.momentum != 0

# The sweep: the only parallel loop over elements, and the stages of a step in it.
#
# A plain step, which hands nothing from stage to stage, takes an array's neighbouring chunks as one long segment.
# Where stages run, TILE elements pass through all of them.  Narrow numbers pass block by block, since a block of 8-bit
# state shares a scale.

from cython.parallel cimport prange

cdef enum:
    PARALLEL_FROM = 1 << 14  # elements: from here on a step takes several threads, and runs without the GIL

cdef enum Work:          # of a sweep
    STEP, FINISH, START, COPY, ADD, SQUARES, LARGEST, KEEP, RESTORE, CATCH_UP, DERIVE, BEGIN, AVERAGE


cdef inline bint staged(const Space* space, const Group* group) noexcept nogil:
    """Does anything but the rule run?  Then the intermediate results must stay in cache, tile by tile."""
    return (group.factor != 1 or space.by_array or space.max_grad_value != 0 or group.bounds != NO_BOUNDS
            or group.ema != NULL or group.copy_format != NATIVE or space.zero_grad or group.formed
            or group.options.sum_to_one or (group.options.weight_decay != 0 and not group.options.decoupled))


cdef APART apply_in_row(const Group* group, const Piece* piece, const floating* g, floating* p, void** s,
                        const Options* o, const Step* k) noexcept nogil:
    """The rule alone, with one second moment for the row.  If the piece is all of it, that is taken here, in cache."""
    cdef Py_ssize_t n = piece.stop - piece.start
    if n == piece.array.row_length and piece.rows_to != BEGUN:
        take_moment(group.rule, mean_square(n, g), s, o, k)
    apply_by_row(group.rule, n, p, g, s, o, k)


cdef inline void apply_one(const Group* group, const Piece* piece, const floating* g, floating* p, void** s,
                           const Options* o, const Step* k) noexcept nogil:
    """The rule alone."""
    if k.by_row:
        apply_in_row(group, piece, g, p, s, o, k)
    else:
        apply_rule(group.rule, piece.stop - piece.start, p, g, s, o, k)


cdef inline void apply(const Group* group, const Piece* piece, const floating* g, floating* p, void** s,
                       const Options* o, const Step* k, const uint64_t* keys) noexcept nogil:
    """The rule and the stages around it, over one piece whose gradient is unscaled and clipped."""
    cdef floating decayed[TILE]
    cdef Py_ssize_t n = piece.stop - piece.start
    if o.weight_decay != 0 and not o.decoupled:
        decay_gradient(n, decayed, g, p, o.weight_decay)
        g = decayed
    apply_one(group, piece, g, p, s, o, k)
    if group.bounds == SAME_BOUNDS:
        bound(n, p, group.low, group.high)
    elif group.bounds == OWN_BOUNDS:
        bound_each(n, p, <const floating*> group.lows + piece.start, <const floating*> group.highs + piece.start)
    if o.sum_to_one:
        settle_rows(group, piece, p, o, keys)
    else:
        settle(group, piece, p, o, keys)


cdef inline const floating* usable_gradient(const Space* space, const Group* group, const Piece* piece,
                                            const floating* p, floating* spare) noexcept nogil:
    """A piece's gradient: read, or formed from a target, unscaled and clamped.

    p: its parameters.  spare: two tiles: a stage reads one and writes the other.  The lower one is written first;
    docs/performance.md says why.
    """
    cdef Py_ssize_t n = piece.stop - piece.start, turn
    cdef double factor = factor_of(space, group, piece.array)
    cdef const floating* g = read_piece(piece, spare)
    turn = TILE if g == spare else 0
    if group.targets:
        difference(n, spare + turn, p, g)
        g = spare + turn
        turn = TILE - turn
    if factor != 1:
        scale(n, spare + turn, g, factor)
        g = spare + turn
        turn = TILE - turn
    if space.max_grad_value != 0:
        clamp_gradient(n, spare + turn, g, space.max_grad_value)
        g = spare + turn
    return g


cdef void run_segment(const Space* space, const Group* group, const Piece* piece, floating* p,
                      void** s) noexcept nogil:
    """All stages over one piece.  p, s: its parameters and its state as the rule takes them."""
    cdef floating spare[2 * TILE]
    cdef const floating* g = usable_gradient(space, group, piece, p, spare)
    apply(group, piece, g, p, s, &group.options, space.steps + piece.array.step, group.keys)
    if space.zero_grad and piece.array.touched == NULL:
        zero_piece(group, piece)


cdef void replay(const Group* group, const Piece* piece, const Past* past, floating* p, void** s) noexcept nogil:
    """A step that a piece of a row has missed."""
    cdef floating zeros[TILE]
    fill(piece.stop - piece.start, zeros, past.zero)
    apply(group, piece, zeros, p, s, &past.options, &past.step, past.keys)


cdef inline floating* parameters_of(const Group* group, const Piece* piece, floating* widened) noexcept nogil:
    """What a rule works on: the parameters of a piece, their master copy, or narrow ones widened."""
    if floating is float:
        if group.master != NULL:
            return group.master + piece.start
        if group.format != NATIVE:
            widen(group.format, piece.stop - piece.start, widened, piece.array.p, piece.at)
            return widened
    return <floating*> piece.array.p + piece.at


cdef void replay_piece(const Group* group, const Piece* piece, const Past* past) noexcept nogil:
    """The same, from what is stored to what is stored: the piece lies in one tile and, of narrow numbers, one block."""
    cdef Py_ssize_t j, n = piece.stop - piece.start
    cdef float buffer[SLOTS][BLOCK]
    cdef float widened[BLOCK]
    cdef void* s[SLOTS]
    for j in range(SLOTS):
        s[j] = group.state[j] + piece.start * group.state_itemsize[j]
        if group.state[j] != NULL and group.state_format != NATIVE:
            decode_block(group, j, piece.start, n, buffer[j])
            s[j] = buffer[j]
    if group.by_moments:
        find_moments(group, piece, s)
    if group.wide:
        replay(group, piece, past, <double*> piece.array.p + piece.at, s)
    else:
        replay(group, piece, past, parameters_of(group, piece, widened), s)
    for j in range(SLOTS):
        if group.state[j] != NULL and group.state_format != NATIVE:
            encode_block(group, j, piece.start, n, buffer[j], group.nearest[j], past.keys)


cdef inline Py_ssize_t first_missed(const Behind* behind, Py_ssize_t at) noexcept nogil:
    """The number, in the log, of the first step that the row of element `at` has missed."""
    return max(behind.done[at // behind.length] - (behind.made - behind.n), 0)


cdef APART catch_up_piece(const Group* group, const Piece* piece) noexcept nogil:
    """All steps that a piece of one row has missed."""
    cdef const Behind* behind = piece.array.behind
    cdef Py_ssize_t i
    if behind.n == 0:
        return
    for i in range(first_missed(behind, piece.at), behind.n):
        replay_piece(group, piece, behind.log + i)


cdef void catch_up_row(const Group* group, const Array* a, Py_ssize_t at) noexcept nogil:
    """The same for a row that sums to one after each of them, from element `at` of its array on."""
    cdef Py_ssize_t unit = piece_unit(group), i, begin = a.start + at, end = begin + row_length(a)
    cdef Piece piece
    piece.array = a
    for i in range(first_missed(a.behind, at), a.behind.n):
        piece.at, piece.start, piece.stop = at, begin, begin
        while next_in_array(&piece, unit, end):
            replay_piece(group, &piece, a.behind.log + i)
        if begin // unit != (end - 1) // unit:
            finish_row_at(group, a, at, &a.behind.log[i].options, a.behind.log[i].keys)


# --- rows whose second moment has to be taken before their first piece is stepped -------------------------------------

cdef floating mean_of_row(const Space* space, const Group* group, const Piece* row, const Past* past,
                          floating* spare) noexcept nogil:
    """The mean of the squared gradient, as the rule sees it, of a row in which a piece begins; as `mean_square`.

    past: the missed step that it is of, or NULL.  spare: four tiles.
    """
    cdef const Options* o = &group.options if past == NULL else &past.options
    cdef const floating* g
    cdef const floating* p
    cdef double lanes[LANES]
    cdef double total = 0
    cdef Py_ssize_t n, column = 0, length = row.array.row_length
    cdef Piece part = row[0]
    while column < length:
        n = min(TILE, length - column)
        part.start, part.at, part.stop = row.start + column, row.at + column, row.start + column + n
        p = parameters_of(group, &part, spare + 3 * TILE)
        if past == NULL:
            g = usable_gradient(space, group, &part, p, spare)
        else:
            fill(n, spare, past.zero)
            g = spare
        if o.weight_decay != 0 and not o.decoupled:
            decay_gradient(n, spare + 2 * TILE, g, p, o.weight_decay)
            g = spare + 2 * TILE
        if column % CHUNK == 0:
            memset(lanes, 0, sizeof(lanes))
        add_squares(0, n, g, lanes)
        column += n
        if column % CHUNK == 0 or column == length:
            total += fold(lanes)
    return <floating> (total / length)


cdef void take_row(const Space* space, const Group* group, const Piece* row, const Past* past) noexcept nogil:
    """Take the second moment of a row in which a piece begins."""
    cdef double spare[4 * TILE]
    cdef void* s[SLOTS]
    cdef const Options* o = &group.options
    cdef const Step* k = space.steps + row.array.step
    if past != NULL:
        o, k = &past.options, &past.step
    find_moments(group, row, s)
    if group.wide:
        take_moment(group.rule, mean_of_row(space, group, row, past, spare), s, o, k)
    else:
        take_moment(group.rule, mean_of_row(space, group, row, past, <float*> spare), s, o, k)


cdef void catch_up_moments(const Space* space, const Group* group, const Piece* row) noexcept nogil:
    """All steps that a row has missed in which a piece begins: one after the other, since each needs the whole row."""
    cdef const Behind* behind = row.array.behind
    cdef Py_ssize_t i, unit = piece_unit(group), end = row.start + row.array.row_length
    cdef Piece part = row[0]
    part.rows_to = BEGUN
    for i in range(first_missed(behind, row.at) if behind.n else 0, behind.n):
        take_row(space, group, row, behind.log + i)
        part.at, part.start, part.stop = row.at, row.start, row.start
        while next_in_array(&part, unit, end):
            replay_piece(group, &part, behind.log + i)


cdef APART begin_row(const Space* space, const Group* group, const Piece* row, bint caught_up_only) noexcept nogil:
    """What a row needs in which a piece begins, before that is stepped."""
    if row.array.behind != NULL:
        catch_up_moments(space, group, row)
    if not caught_up_only:
        take_row(space, group, row, NULL)


cdef APART begin_piece(const Space* space, const Group* group, const Piece* piece, bint caught_up_only) noexcept nogil:
    """What a piece needs before it is stepped; that of a row in several pieces needs it at the first of them."""
    cdef Py_ssize_t length = piece.array.row_length
    if length == 0 or piece.stop - piece.start == length:
        if piece.array.behind != NULL and (caught_up_only or piece.array.touched != NULL):
            catch_up_piece(group, piece)
    elif piece.at % length == 0 and piece.start + length <= piece.rows_to:
        begin_row(space, group, piece, caught_up_only)


cdef void begin_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Take the second moments of the rows that begin in start .. end-1."""
    cdef Piece piece = pieces_from(group, start)
    piece.rows_to = BEGUN
    while group.by_moments and next_stepped(&piece, end):
        if piece.array.row_length != 0 and piece.at % piece.array.row_length == 0:
            take_row(space, group, &piece, NULL)


cdef void begin_cut_rows(const Space* space, Work work, Py_ssize_t first, Py_ssize_t last, Py_ssize_t n) noexcept nogil:
    """Begin the rows that the cuts between parts of a sweep divide; every other row is begun by the thread that has it.
    """
    cdef const Group* group
    cdef Py_ssize_t i, part, start, before, here
    cdef Piece row
    cdef bint flush = space.flush_denormals
    cdef uint64_t mode = enter_mode(flush)
    for i in range(space.n_groups):
        group = space.groups[i]
        here = first
        for part in range(1, n if group.by_moments else 1):
            before, here = here, cut(space, first, last, part, n)
            start = here - group.position
            if not 0 < start < group.size:
                continue
            row = pieces_from(group, start)
            if row.array.row_length == 0 or row.at <= 0 or row.at % row.array.row_length == 0:
                continue
            start -= row.at % row.array.row_length
            if group.position + start < before:  # an earlier cut divides it, too
                continue
            row = pieces_from(group, start)
            start += row.array.row_length
            if (work == CATCH_UP and not space.by_rows and next_piece(&row, start)) or next_stepped(&row, start):
                begin_row(space, group, &row, work == CATCH_UP)
    leave_mode(mode, flush)


cdef void catch_up_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Bring elements start .. end-1 up to date; in a call by rows, those that are touched."""
    cdef Piece piece = pieces_from(group, start)
    cdef Py_ssize_t length, at
    piece.rows_to = end
    while next_stepped(&piece, end) if space.by_rows else next_piece(&piece, end):
        if piece.array.behind == NULL or piece.array.behind.n == 0:
            continue
        if group.options.sum_to_one:  # the rows that begin here
            length = row_length(piece.array)
            at = (piece.at + length - 1) // length * length
            while at < piece.at + (piece.stop - piece.start):
                catch_up_row(group, piece.array, at)
                at += length
            continue
        length = piece.array.behind.length
        piece.stop = min(piece.stop, min(piece.array.start + (piece.at // length + 1) * length,
                                         (piece.start // BLOCK + 1) * BLOCK))
        begin_piece(space, group, &piece, True)


cdef inline void run_plain(const Space* space, const Group* group, const Piece* piece, floating* p,
                           void** s) noexcept nogil:
    """The rule alone over such a piece: the way through the stages, all of them off, takes longer than most rules."""
    cdef const Touched* touched = piece.array.touched
    cdef Py_ssize_t moved = touched.entries[touched.first[piece.row]] - touched.rows[piece.row]
    cdef const floating* g = <const floating*> piece.array.g + piece.at + moved * touched.length
    apply_one(group, piece, g, p, s, &group.options, space.steps + piece.array.step)


cdef void run_pieces(const Space* space, const Group* group, Piece* piece, Py_ssize_t end) noexcept nogil:
    """The pieces up to `end` of a group whose parameters and state are as the rule computes."""
    cdef void* s[SLOTS]
    cdef bint plain = not staged(space, group)
    cdef int j
    while next_stepped(piece, end):
        if group.options.sum_to_one:
            piece.stop = min(piece.stop, (piece.start // TILE + 1) * TILE)
        prefetch_ahead(group, piece)
        if piece.array.behind != NULL or piece.stop - piece.start < piece.array.row_length:
            begin_piece(space, group, piece, False)
        for j in range(SLOTS):
            s[j] = group.state[j] + piece.start * group.state_itemsize[j]
        if group.by_moments:
            find_moments(group, piece, s)
        if plain and piece.array.touched != NULL and is_plain(piece):
            if group.wide:
                run_plain(space, group, piece, <double*> piece.array.p + piece.at, s)
            else:
                run_plain(space, group, piece, <float*> piece.array.p + piece.at, s)
        elif group.wide:
            run_segment(space, group, piece, <double*> piece.array.p + piece.at, s)
        else:
            run_segment(space, group, piece, <float*> piece.array.p + piece.at, s)


cdef extern from *:
    """
    #if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
    #define WIDE __attribute__((noinline, flatten, target("prefer-vector-width=512"))) void
    #else
    #define WIDE void
    #endif
    """
    # Return type of functions that are compiled, together with everything they inline, for 512-bit vectors in the v4
    # build: conversions gain from them, while a rule by itself is faster with the 256 of setup.py, and a wide load
    # would have to wait for two narrow stores.  They are not inlined into each other, so that a rule's loop has the
    # registers for itself.
    ctypedef void WIDE


cdef WIDE run_narrow(const Space* space, const Group* group, const Piece* piece, float* p, void** s) noexcept nogil:
    """All stages over a piece of a block whose state or parameters are narrow."""
    run_segment(space, group, piece, p, s)


cdef APART begin_block(const Space* space, const Group* group, Piece piece, Py_ssize_t end) noexcept nogil:
    """Begin the pieces of a block."""
    cdef bint more = True
    while more:
        begin_piece(space, group, &piece, False)
        more = next_stepped(&piece, end)


cdef inline void run_block(const Space* space, const Group* group, Piece* piece, Py_ssize_t start,
                           Py_ssize_t end) noexcept nogil:
    """The pieces of (a part of) a block whose state or parameters are narrow; piece: the first one."""
    cdef float buffer[SLOTS][BLOCK]
    cdef float widened[BLOCK]
    cdef void* s[SLOTS]
    cdef const Array* first = piece.array
    cdef bint dense = first.touched == NULL, more = True
    cdef int j
    if group.by_moments or (group.by_rows and group.options.exact):
        begin_block(space, group, piece[0], end)
    if dense and group.master != NULL:
        prefetch(group.master, start + AHEAD, 4)
    elif dense:
        prefetch(first.p, start + AHEAD - first.start, parameter_itemsize(group))
    for j in range(SLOTS):
        if group.state[j] != NULL and group.state_format != NATIVE:
            decode_block(group, j, start, end - start, buffer[j])
    while more:
        prefetch_ahead(group, piece)
        for j in range(SLOTS):
            s[j] = buffer[j] + (piece.start - start)
            if group.state_format == NATIVE:
                s[j] = group.state[j] + piece.start * group.state_itemsize[j]
        if group.by_moments:
            find_moments(group, piece, s)
        run_narrow(space, group, piece, parameters_of(group, piece, widened), s)
        more = piece.stop < end and next_stepped(piece, end)
    if dense:
        prefetch(first.g, start + AHEAD - first.start, gradient_itemsize(group, first))
    for j in range(SLOTS):
        if group.state[j] != NULL:
            if dense:
                prefetch(group.state[j], start + AHEAD, group.state_itemsize[j])
            if group.state_format != NATIVE:
                encode_block(group, j, start, end - start, buffer[j], group.nearest[j], group.keys)


cdef WIDE run_blocks(const Space* space, const Group* group, Piece* piece, Py_ssize_t end) noexcept nogil:
    """The pieces up to `end` of a group whose state or parameters are narrow, block by block."""
    cdef Py_ssize_t start, stop
    while next_stepped(piece, end):  # only blocks that have a gradient
        start = piece.start // BLOCK * BLOCK
        stop = min(start + BLOCK, end)
        piece.stop = min(piece.stop, stop)
        run_block(space, group, piece, start, stop)


cdef void run_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Step elements start .. end-1 of one group's parameter space, from the start of a block."""
    cdef Piece piece = pieces_from(group, start)
    piece.rows_to = BEGUN if space.begun else end
    if group.format != NATIVE or group.state_format != NATIVE:
        run_blocks(space, group, &piece, end)
    else:
        if group.by_rows or staged(space, group):
            piece.most = TILE
        run_pieces(space, group, &piece, end)


cdef void run_part(const Space* space, Work work, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    """One thread's part of a sweep: positions first .. last-1."""
    cdef const Group* group
    cdef Py_ssize_t i, start, end
    # the others compute nothing
    cdef bint flush = space.flush_denormals and (work == STEP or work == FINISH or work == ADD or work == CATCH_UP
                                                 or work == BEGIN)
    cdef uint64_t mode = enter_mode(flush)
    for i in range(space.n_groups):
        group = space.groups[i]
        start = max(first - group.position, 0)
        end = min(last - group.position, group.size)
        if start >= end:
            continue
        if work == STEP:
            run_group(space, group, start, end)
        elif work == FINISH:
            finish_group(group, start, end)
        elif work == START:
            start_group(group, start, end)
        elif work == COPY:
            copy_parameters(group, start, end)
        elif work == DERIVE:
            derive_group(group, start, end)
        elif work == AVERAGE:
            take_averages(group, start, end)
        elif work == CATCH_UP:
            catch_up_group(space, group, start, end)
        elif work == BEGIN:
            begin_group(space, group, start, end)
        elif work == ADD:
            add_gradients(space, group, start, end)
        elif work == SQUARES or work == LARGEST:
            reduce_chunks(space, group, start, end, work == SQUARES)
        else:
            move_chunks(group, start, end, work == RESTORE)
    leave_mode(mode, flush)


cdef void sweep(const Space* space, Work work, Py_ssize_t first, Py_ssize_t last, int n_threads) noexcept nogil:
    """Each thread takes neighbouring chunks.  If the team is smaller than asked for, a thread takes several parts."""
    cdef Py_ssize_t part
    if n_threads <= 1:
        run_part(space, work, first, last)
    else:
        if not space.begun and (work == STEP or work == CATCH_UP):
            begin_cut_rows(space, work, first, last, n_threads)
        for part in prange(n_threads, schedule="static", num_threads=n_threads):
            run_part(space, work, cut(space, first, last, part, n_threads),
                     cut(space, first, last, part + 1, n_threads))


cdef Py_ssize_t cut(const Space* space, Py_ssize_t first, Py_ssize_t last, Py_ssize_t part,
                    Py_ssize_t n) noexcept nogil:
    """The position where a part of n begins, at a multiple of CHUNK."""
    cdef Py_ssize_t chunk = first // CHUNK
    if space.by_rows and 0 < part < n:
        chunk = cut_by_rows(space, part, n) // CHUNK
    else:
        chunk += (chunks_to(last) - chunk) * part // n
    return min(max(chunk * CHUNK, first), last)

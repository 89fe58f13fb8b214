# Narrow numbers of a group, block by block: state decoded before the rule and encoded after it, parameters rounded.


cdef void decode_block(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n, float* out) noexcept nogil:
    """The narrow state of elements start .. start+n-1, (a part of) one block."""
    cdef const char* code = group.state[slot] + start * group.state_itemsize[slot]
    if group.state_format == BFLOAT16:
        from_bfloat16(n, out, <const uint16_t*> code)
    elif group.signed[slot]:
        decode_signed(n, out, <const signed char*> code, bits_of(group.scales[slot][start // BLOCK]))
    else:
        decode_unsigned(n, out, <const uint8_t*> code, bits_of(group.scales[slot][start // BLOCK]))


cdef void encode_block(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n, const float* x,
                       bint nearest, const uint64_t* keys) noexcept nogil:
    """The inverse.  Decoded numbers are encoded as they were, except those that a new scale leaves too small.

    keys: of the step's noise.
    """
    cdef char* code = group.state[slot] + start * group.state_itemsize[slot]
    cdef Py_ssize_t at = start % BLOCK  # 8-bit state comes in whole blocks
    cdef uint32_t word = 0 if nearest else noise_word(keys[1 + slot], start // BLOCK)
    cdef const Noises* noise = &noises
    if nearest:
        noise = &halves
    if group.only_bfloat16:
        round_number(n, <uint16_t*> code, x, noise.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
    elif group.state_format == BFLOAT16:
        round_head(n, <uint16_t*> code, x, noise.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
    else:
        group.scales[slot][start // BLOCK] = encode_uint8(n, <uint8_t*> code, x, group.signed[slot], noise.uint8,
                                                          word >> (32 - CUT_UINT8),
                                                          group.scales[slot][start // BLOCK])


cdef void store_parameters(const Group* group, const Piece* piece, floating* p, const uint64_t* keys) noexcept nogil:
    """Round p, a piece of one block, into its narrow array; without a master copy, p becomes what was stored."""
    cdef char* out = piece.array.p + 2 * piece.at
    cdef Py_ssize_t at = piece.start % BLOCK, n = piece.stop - piece.start
    cdef uint32_t word
    if floating is float:
        if group.master != NULL:
            narrow(group.format, n, out, 0, p)
            return
        word = noise_word(keys[0], piece.start // BLOCK)
        if group.only_bfloat16:
            round_number(n, <uint16_t*> out, p, noises.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
        elif group.format == BFLOAT16:
            round_head(n, <uint16_t*> out, p, noises.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
        else:
            round_float16(n, <uint16_t*> out, p, noises.float16 + at, word >> (32 - CUT_FLOAT16))
        if group.ema != NULL or group.copy_format != NATIVE:
            widen(group.format, n, p, out, 0)

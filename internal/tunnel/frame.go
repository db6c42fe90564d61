package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// headerLen is kind (8 bits), length of the payload (24 bits) and stream id
// (32 bits), big endian.
const headerLen = 8

// Limits of the format. What is above them ends the tunnel.
const (
	// MaxPayload is the largest payload of a data frame, in bytes: with its
	// header it fills eight TLS records.
	MaxPayload = blockSize - headerLen
	// MaxTarget is the longest name of a target, in bytes.
	MaxTarget = 255
	// maxReason is the longest reason of a reset, in bytes.
	maxReason = 200
)

type kind uint8

const (
	kindOpen    kind = iota + 1 // client only; payload: the target's name
	kindData                    // payload: 1 to MaxPayload bytes
	kindEnd                     // the sender sends no more on this stream
	kindClose                   // and reads no more: the stream is over
	kindReset                   // the stream is over; payload: code, reason
	kindWindow                  // payload: how many more bytes the sender of data may send
	kindBlocked                 // the sender of data has more than the window lets through
	kindPing                    // stream 0; payload: 8 bytes, which the pong repeats
	kindPong
)

var errFrame = errors.New("the peer breaks the tunnel protocol")

// header is that of a frame.
type header struct {
	kind kind
	id   uint32
	n    int // length of the payload
}

func putHeader(b []byte, h header) {
	binary.BigEndian.PutUint32(b, uint32(h.kind)<<24|uint32(h.n))
	binary.BigEndian.PutUint32(b[4:], h.id)
}

// parseHeader reads the first headerLen bytes of a frame, and refuses kinds,
// lengths and ids that no frame has.
func parseHeader(b []byte) (header, error) {
	if len(b) < headerLen {
		return header{}, fmt.Errorf("%w: %d bytes are no header", errFrame, len(b))
	}
	first := binary.BigEndian.Uint32(b)
	h := header{kind: kind(first >> 24), n: int(first & 0xffffff), id: binary.BigEndian.Uint32(b[4:])}
	lo, hi, ok := lengths(h.kind)
	switch {
	case !ok:
		return h, fmt.Errorf("%w: frame of unknown kind %d", errFrame, h.kind)
	case h.n < lo || h.n > hi:
		return h, fmt.Errorf("%w: frame of kind %d with %d bytes, not %d to %d", errFrame, h.kind, h.n, lo, hi)
	case (h.id == 0) != (h.kind == kindPing || h.kind == kindPong):
		return h, fmt.Errorf("%w: frame of kind %d for stream %d", errFrame, h.kind, h.id)
	}
	return h, nil
}

// lengths returns the bounds of the payload of a kind.
func lengths(k kind) (lo, hi int, ok bool) {
	switch k {
	case kindOpen:
		return 1, MaxTarget, true
	case kindData:
		return 1, MaxPayload, true
	case kindEnd, kindClose, kindBlocked:
		return 0, 0, true
	case kindReset:
		return 1, 1 + maxReason, true
	case kindWindow:
		return 4, 4, true
	case kindPing, kindPong:
		return 8, 8, true
	}
	return 0, 0, false
}

// checkTarget refuses names that could not stand in a log line. Whether there
// is such a target is the server's business.
func checkTarget(name string) error {
	if name == "" || len(name) > MaxTarget {
		return fmt.Errorf("name of a target with %d bytes, not 1 to %d", len(name), MaxTarget)
	}
	return printable(name)
}

func printable(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("text that is not UTF-8")
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			return errors.New("text with control characters")
		}
	}
	return nil
}

// appendReset appends the payload of a reset. A reason that is too long is cut,
// one that is not printable is left out.
func appendReset(b []byte, e *RefusedError) []byte {
	reason := e.Reason
	if len(reason) > maxReason {
		cut := maxReason
		for cut > 0 && !utf8.RuneStart(reason[cut]) {
			cut--
		}
		reason = reason[:cut]
	}
	if printable(reason) != nil {
		reason = ""
	}
	return append(append(b, byte(e.Code)), reason...)
}

// parseReset reads the payload of a reset, whose length parseHeader has checked.
func parseReset(b []byte) (*RefusedError, error) {
	if len(b) < 1 {
		return nil, fmt.Errorf("%w: reset without a code", errFrame)
	}
	reason := string(b[1:])
	if err := printable(reason); err != nil {
		return nil, fmt.Errorf("%w: reset: %w", errFrame, err)
	}
	return &RefusedError{Code: Code(b[0]), Reason: reason}, nil
}

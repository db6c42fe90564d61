package wire

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Limits on what one message may take, in bytes. They hold before and after
// authentication: a certified peer may be owned too.
const (
	MaxEnrollBody  = 64 << 10 // every body on the enrolment ALPNs
	MaxEcho        = 64 << 10 // POST /v1/echo
	MaxSignalLine  = 1 << 10  // one line of GET /v1/signals
	MaxPeersLine   = 8 << 10  // one line of GET /v1/peers
	MaxHello       = 4 << 20  // GET /v1/hello with its policy statuses
	MaxDesired     = 8 << 20  // PUT /v1/desired, envelope included
	MaxActionBody  = 256 << 10
	MaxFrameLine   = 256 << 10 // one line of an outbox or action stream: an event may need six bytes of JSON for one of text
	MaxEventText   = 32 << 10  // text of one event; the other fields are at most MaxEventField
	MaxEventField  = 1 << 10
	MaxRevocations = 16 << 20
	MaxHeader      = 16 << 10 // request headers, on every listener
)

// ErrTooLarge says that a peer sent more than the limit of its message.
var ErrTooLarge = errors.New("message is larger than its limit")

// ErrMalformed says that a line is not what its reader expects.
var ErrMalformed = errors.New("malformed line")

// DecodeJSON reads exactly one JSON value of at most limit bytes from r into
// v. It refuses trailing data; unknown fields are ignored, so that a newer
// peer may add some.
func DecodeJSON(r io.Reader, limit int64, v any) error {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return err
	}
	if int64(len(b)) > limit {
		return fmt.Errorf("%w (%d bytes)", ErrTooLarge, limit)
	}
	return json.Unmarshal(b, v)
}

// LineReader reads newline-delimited JSON with a limit on each line.
type LineReader struct {
	r     *bufio.Reader
	limit int
	long  []byte
}

// NewLineReader returns a reader of lines of at most limit bytes. It buffers
// 4 KiB, or a quarter of a smaller limit, until a longer line arrives: an idle
// stream must stay cheap.
func NewLineReader(r io.Reader, limit int) *LineReader {
	return &LineReader{r: bufio.NewReaderSize(r, min(limit/4, 4<<10)), limit: limit}
}

// Next decodes the next line into v. It returns io.EOF at the clean end of the
// stream, io.ErrUnexpectedEOF inside a line; ErrTooLarge and ErrMalformed are
// the peer's fault.
func (l *LineReader) Next(v any) error {
	l.long = l.long[:0]
	for {
		part, err := l.r.ReadSlice('\n')
		if len(l.long)+len(part) > l.limit {
			return fmt.Errorf("%w (line of %d bytes)", ErrTooLarge, l.limit)
		}
		if err == nil && len(l.long) == 0 {
			return decodeLine(part, v)
		}
		l.long = append(l.long, part...)
		switch {
		case err == nil:
			return decodeLine(l.long, v)
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(l.long) > 0:
			return io.ErrUnexpectedEOF
		default:
			return err
		}
	}
}

// Buffered is how much of the next line, in bytes, was read already.
func (l *LineReader) Buffered() int { return l.r.Buffered() }

func decodeLine(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

// AppendLine appends v as one line of JSON.
func AppendLine(b []byte, v any) ([]byte, error) {
	buf := bytes.NewBuffer(b)
	if err := json.NewEncoder(buf).Encode(v); err != nil {
		return b, err
	}
	return buf.Bytes(), nil
}

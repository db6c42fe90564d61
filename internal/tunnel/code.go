package tunnel

import (
	"errors"
	"fmt"
)

// Code says why a stream was refused or cut.
type Code uint8

// The codes. Reset is what a local connection's RST becomes on its way.
const (
	NotFound    Code = iota + 1 // there is no such target here
	Forbidden                   // the node's own configuration does not allow it
	Unreachable                 // the target could not be dialled
	Timeout                     // or not in time
	Locked                      // the node obeys another gateway
	Draining                    // this end takes no new streams
	Overloaded                  // too many streams
	Reset                       // the connection beyond was reset, or is of no more use
	Failed                      // this end could not do its part
)

func (c Code) String() string {
	switch c {
	case NotFound:
		return "no such target"
	case Forbidden:
		return "target is not allowed"
	case Unreachable:
		return "target cannot be reached"
	case Timeout:
		return "target does not answer"
	case Locked:
		return "node is locked"
	case Draining:
		return "draining"
	case Overloaded:
		return "too many streams"
	case Reset:
		return "connection reset"
	case Failed:
		return "failed"
	}
	return fmt.Sprintf("code %d", uint8(c))
}

// RefusedError says that the other end refused a stream, or cut it later.
type RefusedError struct {
	Code   Code
	Reason string // from the peer, so for people only
}

func (e *RefusedError) Error() string {
	if e.Reason == "" {
		return e.Code.String()
	}
	return e.Code.String() + ": " + e.Reason
}

var (
	// ErrClosed says that this end of a tunnel was closed.
	ErrClosed = errors.New("the tunnel was closed")
	// ErrEnded says that the other end of a tunnel is gone.
	ErrEnded = errors.New("the other end ended the tunnel")
	// ErrSilent says that the other end gave no sign of life.
	ErrSilent = errors.New("the other end of the tunnel is silent")
	// ErrFull says that a tunnel has no room for another stream.
	ErrFull = errors.New("the tunnel has no room for another stream")
	// ErrStopped says that the other end of a stream was closed: it reads no more.
	ErrStopped = errors.New("the other end reads no more")
)

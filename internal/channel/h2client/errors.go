package h2client

import (
	"errors"
	"fmt"
)

// Conditions that callers tell apart.
var (
	ErrClosed    = errors.New("HTTP/2 connection is closed")
	ErrGoingAway = errors.New("the peer takes no more requests on this HTTP/2 connection")
	ErrNoAnswer  = errors.New("no response headers within the time limit")
	ErrSilent    = errors.New("the peer does not answer keep-alives")
	ErrStuck     = errors.New("the peer does not read")
	ErrTooLarge  = errors.New("headers are above the limit")

	errWriteEnded = errors.New("the sending side of the stream is closed")
	errBodyClosed = errors.New("the stream is closed")
	errUsedUp     = fmt.Errorf("%w: its stream numbers are used up", ErrGoingAway)
)

// ErrCode is an error code of RFC 9113 section 7.
type ErrCode uint32

// The codes that are sent or have a meaning of their own here.
const (
	CodeNo              ErrCode = 0x0
	CodeProtocol        ErrCode = 0x1
	CodeFlowControl     ErrCode = 0x3
	CodeStreamClosed    ErrCode = 0x5
	CodeFrameSize       ErrCode = 0x6
	CodeCancel          ErrCode = 0x8
	CodeCompression     ErrCode = 0x9
	CodeEnhanceYourCalm ErrCode = 0xb
)

var codeNames = [...]string{"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
	"REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"}

func (c ErrCode) String() string {
	if int64(c) < int64(len(codeNames)) {
		return codeNames[c]
	}
	return fmt.Sprintf("error %#x", uint32(c))
}

// StreamError says that one stream was reset, by the peer or by us.
type StreamError struct {
	Code   ErrCode
	Remote bool
	Reason string // ours; empty: the peer gave only the code
}

func (e *StreamError) Error() string {
	if e.Remote {
		return "HTTP/2 stream was reset by the peer: " + e.Code.String()
	}
	return fmt.Sprintf("HTTP/2 stream was reset, %s: %s", e.Code, e.Reason)
}

// ConnError says that a connection ended because one side broke the protocol.
type ConnError struct {
	Code   ErrCode
	Remote bool
	Reason string // from the peer it is for people only
}

func (e *ConnError) Error() string {
	who := "the peer broke HTTP/2"
	if e.Remote {
		who = "the peer ends the HTTP/2 connection"
	}
	if e.Reason == "" {
		return who + ": " + e.Code.String()
	}
	return fmt.Sprintf("%s, %s: %s", who, e.Code, e.Reason)
}

func broken(code ErrCode, reason string) error { return &ConnError{Code: code, Reason: reason} }

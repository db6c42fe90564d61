// Package local is the door that a role opens to its own host: HTTP and JSON
// over the unix socket $SALLYPORT_DATA/<role>/local.sock.
//
// Any local user may read the status and send events; changes and profiles are
// for root and for the user that the role runs as, which the kernel tells by
// SO_PEERCRED. One user's connections never shut out another's.
package local

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"time"

	"sallyport/internal/wire"
)

// SocketName is the socket's name inside a role's directory.
const SocketName = "local.sock"

// SocketPath is where role listens when SALLYPORT_DATA is data.
func SocketPath(data string, role wire.Role) string {
	return filepath.Join(data, string(role), SocketName)
}

// Role is what a role shows of itself.
type Role interface {
	Status(ctx context.Context) Status
	Doctor(ctx context.Context) []Check
}

// The rest is optional: a role that has no events, locks or join codes leaves
// the method out, and the socket answers [CodeUnsupported].
type (
	// EventSender takes an event and returns when it is on disk.
	EventSender interface {
		SendEvent(ctx context.Context, e EventRequest) (EventReceipt, error)
	}
	// Unlocker makes a locked instance obey its gateway again. An empty
	// instance means the only one that is locked.
	Unlocker interface {
		Unlock(ctx context.Context, instance string) error
	}
	// Joiner enrols with a join code (its text, not a file name).
	Joiner interface {
		Join(ctx context.Context, code string) error
	}
)

// Status of a role. The members up to Outbox are the contract of
// `local status -o json`; lists are never null.
type Status struct {
	Role        wire.Role             `json:"role"`
	ID          wire.ID               `json:"id"`
	Name        string                `json:"name"`
	Fingerprint string                `json:"fingerprint"`
	State       string                `json:"state"`
	Reason      string                `json:"reason"`
	Upstreams   []wire.UpstreamStatus `json:"upstreams"`
	Instances   []Instance            `json:"instances"`
	Outbox      Outbox                `json:"outbox"`

	Version     string         `json:"version"`
	Started     time.Time      `json:"started"`
	Boot        string         `json:"boot,omitempty"` // of this process of a node, as node show and node reidentify --boot name it
	TrustDomain string         `json:"trust_domain,omitempty"`
	Clock       *Skew          `json:"clock,omitempty"`        // against the gateway's; a node has one for each instance
	NotAfter    time.Time      `json:"not_after,omitzero"`     // of the certificate
	Listen      []string       `json:"listen,omitempty"`       // channel listeners in use
	DialTargets []string       `json:"dial_targets,omitempty"` // everything that this role would ever dial
	Peers       map[string]int `json:"peers,omitempty"`        // an RCP's connected peers by role, "pending" included
}

// Instance is one gateway's isolated world on a node.
type Instance struct {
	TrustDomain     string                `json:"trust_domain"`
	ID              wire.ID               `json:"id"`
	Name            string                `json:"name"`
	Fingerprint     string                `json:"fingerprint"`
	State           string                `json:"state"`
	Reason          string                `json:"reason"`
	Installation    string                `json:"installation,omitempty"`
	AppliedRevision string                `json:"applied_revision"`
	Policies        []wire.PolicyStatus   `json:"policies"`
	Upstreams       []wire.UpstreamStatus `json:"upstreams"`
	Outbox          Outbox                `json:"outbox"`
	NotAfter        time.Time             `json:"not_after,omitzero"`
	Clock           *Skew                 `json:"clock,omitempty"` // against the gateway's
	Boot            string                `json:"boot,omitempty"`  // of this process, as this gateway knows it
}

// Outbox counts events that the gateway does not have yet.
type Outbox struct {
	Depth   int64      `json:"depth"`
	Oldest  *time.Time `json:"oldest"` // null when nothing waits
	Dropped int64      `json:"dropped"`
}

// Check is one finding of `local doctor`. Fix says what to do when it is not
// OK, or when it is a warning: something that works and should not stay so.
type Check struct {
	Check   string `json:"check"`
	OK      bool   `json:"ok"`
	Warning bool   `json:"warning,omitempty"`
	Detail  string `json:"detail"`
	Fix     string `json:"fix,omitempty"`
}

// EventRequest is an event that a local user sends.
type EventRequest struct {
	Severity    wire.Severity `json:"severity"`
	Application string        `json:"application,omitempty"`
	Object      string        `json:"object,omitempty"`
	Key         string        `json:"key,omitempty"`
	Text        string        `json:"text"`
	Instance    string        `json:"instance,omitempty"` // trust domain; empty: all
}

// EventReceipt says where the event is on disk.
type EventReceipt struct {
	Stored []StoredEvent `json:"stored"`
}

// StoredEvent is an event's place in one instance's spool.
type StoredEvent struct {
	Instance string  `json:"instance"`
	ID       wire.ID `json:"id"`
	Spool    string  `json:"spool"`
	Seq      int64   `json:"seq"`
}

type unlockRequest struct {
	Instance string `json:"instance"`
}

type joinRequest struct {
	Code string `json:"code"`
}

// maxBody bounds every request: an event with all its fields, or a join code.
const maxBody = 64 << 10

// Codes of an [Error].
const (
	CodeInvalid     = "invalid"
	CodeForbidden   = "forbidden"
	CodeNotFound    = "not-found"
	CodeRefused     = "refused"
	CodeUnsupported = "unsupported"
	CodeBusy        = "busy" // the caller sends too much
	CodeUnavailable = "unavailable"
	CodeInternal    = "internal"
)

var httpStatus = map[string]int{
	CodeInvalid:     http.StatusBadRequest,
	CodeForbidden:   http.StatusForbidden,
	CodeNotFound:    http.StatusNotFound,
	CodeRefused:     http.StatusConflict,
	CodeUnsupported: http.StatusNotImplemented,
	CodeBusy:        http.StatusTooManyRequests,
	CodeUnavailable: http.StatusServiceUnavailable,
	CodeInternal:    http.StatusInternalServerError,
}

// Error is a refusal. Roles return one to choose the code; any other error
// becomes [CodeInternal]. The message is for people, with what to do next.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"error"`
}

func (e *Error) Error() string { return e.Message }

// ErrNotRunning says that nobody listens on the socket.
var ErrNotRunning = errors.New("no role is running there")

// ErrMute says that somebody listens there and does not answer. It is a
// [context.DeadlineExceeded] too.
var ErrMute error = muteError{}

type muteError struct{}

func (muteError) Error() string { return "the role does not answer" }

func (muteError) Is(target error) bool { return target == context.DeadlineExceeded }

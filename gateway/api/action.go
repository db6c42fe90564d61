package api

import (
	"time"

	"sallyport/internal/wire"
)

// RunAction starts one program on one node, or on all that a selector fits.
type RunAction struct {
	Node     string        `json:"node,omitempty"`     // exact name, UUID, or at least 8 hex digits of one
	Selector string        `json:"selector,omitempty"` // instead of Node
	Command  []string      `json:"command"`
	TTL      wire.Duration `json:"ttl,omitempty"`     // how long it may wait for the node; 0: it must be connected now
	Timeout  wire.Duration `json:"timeout,omitempty"` // how long it may run; 0: no limit
	Key      string        `json:"key,omitempty"`     // idempotency key of the caller: a repeated call answers the same actions
}

// StartedActions answers: one action per node, under one batch.
type StartedActions struct {
	Batch   string   `json:"batch"`
	Actions []Action `json:"actions"`
}

// Action is one line of `action list`. State is one of the Action* states of
// package wire; Code, for a state that is not a program's own end, says why in
// one word.
type Action struct {
	ID        wire.ID       `json:"id"`
	Batch     string        `json:"batch"`
	NodeID    wire.ID       `json:"node_id"`
	Node      string        `json:"node"`
	Command   []string      `json:"command"`
	State     string        `json:"state"`
	Code      string        `json:"code"`
	Reason    string        `json:"reason"`
	ExitCode  *int          `json:"exit_code"`
	Signal    int           `json:"signal"`
	Truncated bool          `json:"truncated"`
	TTL       wire.Duration `json:"ttl"`
	Timeout   wire.Duration `json:"timeout"`
	Created   time.Time     `json:"created"`
	Expires   *time.Time    `json:"expires"`
	Started   *time.Time    `json:"started"`
	Ended     *time.Time    `json:"ended"`
	CreatedBy string        `json:"created_by"`
}

// Codes of actions that did not run to the program's own end.
const (
	ActionCodeNotConnected = "not-connected" // expired at once: ttl 0 and no connection
	ActionCodeExpired      = "expired"       // its ttl passed before it could start
	ActionCodeTimedOut     = "timed-out"     // it ran longer than its timeout
	ActionCodeRefused      = "refused"       // by the node: Reason says which rule
	ActionCodeUnknown      = "unknown"       // the result was lost
	ActionCodeCancelled    = "cancelled"
	ActionCodeNotStarted   = "not-started" // the program could not be started
)

// Exit codes of `action run` for what is not the program's own.
const (
	ExitTimedOut = 124
	ExitNotRun   = 125
	ExitRefused  = 126
)

// Done reports whether the state is final.
func (a Action) Done() bool {
	switch a.State {
	case wire.ActionQueued, wire.ActionSent, wire.ActionRunning:
		return false
	}
	return true
}

// ExitStatus is the exit code of `action run` for one finished action.
func (a Action) ExitStatus() int {
	switch a.State {
	case wire.ActionSucceeded:
		return 0
	case wire.ActionRefused:
		return ExitRefused
	case wire.ActionTimedOut:
		return ExitTimedOut
	case wire.ActionExpired:
		if a.Code == ActionCodeNotConnected {
			return ExitNotRun
		}
		return ExitTimedOut
	case wire.ActionFailed, wire.ActionCancelled:
		if a.ExitCode != nil && *a.ExitCode != 0 && a.Code != ActionCodeNotStarted {
			return *a.ExitCode
		}
	}
	return ExitNotRun
}

// ActionQuery filters actions.
type ActionQuery struct {
	Node  string
	State string
	Batch string
	Page
}

// Output is one piece of an action's output, or, as the last of each action,
// its end. N counts from 1 within the action.
type Output struct {
	Action wire.ID `json:"action"`
	Node   string  `json:"node"`
	N      int64   `json:"n"`
	Stream string  `json:"stream,omitempty"` // stdout, stderr
	Data   []byte  `json:"data,omitempty"`
	End    *Action `json:"end,omitempty"` // the finished action; also sent, without being final, when the state changes
}

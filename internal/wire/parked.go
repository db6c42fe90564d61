package wire

import "time"

// PathParked is part of the session API of nodes and RCPs. GET, with the query
// after=N and wait=D, lists connections of local clients that wait for a
// gateway to accept them; POST ParkedRefusal tells that one is not accepted.
// To accept one, a gateway opens a stream to the target [ParkedTarget] names.
const PathParked = "/v1/parked"

// HintParked says in a signal that connections are parked.
const HintParked = "parked"

// prefixParked begins the names of parked connections among the targets; a
// colon stands in no policy's name.
const prefixParked = "parked:"

// Limits of parked connections.
const (
	MaxParkedList = 1 << 20 // bytes of a list
	MaxParkedWait = Duration(10 * time.Second)
	MaxService    = 253 // bytes of a service's name
)

// Parked is one connection that waits. All of it is what a client says, or is
// said of one, who may be anybody in the party's network.
type Parked struct {
	ID      ID        `json:"id"`
	N       int64     `json:"n"`       // rises with each that is parked at this party
	Service string    `json:"service"` // name that the client asks for, in lower case
	Source  string    `json:"source"`  // its address
	Since   time.Time `json:"since"`
}

// ParkedList is the answer to GET.
type ParkedList struct {
	Parked []Parked `json:"parked"`
}

// ParkedRefusal answers one client. Status is 403 or 502.
type ParkedRefusal struct {
	ID     ID     `json:"id"`
	Status int    `json:"status"`
	Reason string `json:"reason"`
}

// ParkedTarget is the target that a parked connection is.
func ParkedTarget(id ID) string { return prefixParked + string(id) }

// ParseParkedTarget tells whether a target is a parked connection.
func ParseParkedTarget(target string) (ID, bool) {
	if len(target) <= len(prefixParked) || target[:len(prefixParked)] != prefixParked {
		return "", false
	}
	return ID(target[len(prefixParked):]), true
}

package enroll

import (
	"errors"
	"time"
)

// errDecided ends an enrolment channel of a party that has a certificate.
var errDecided = errors.New("the gateway has said whether it renews the certificate: we come back by the ordinary protocol")

// errAnother ends an enrolment channel of a party that has no certificate.
var errAnother = errors.New("there is another join code: we come back to show it")

// decidedGrace is how long the answer to a verdict may take to be on its way.
const decidedGrace = time.Second

// Leave ends the enrolment channel of a party whose certificate is in force as
// soon as a gateway has said whether it renews it, and returns when the channel
// has ended. Such a party tries both protocols in turn, because it or its
// upstream may have missed a change of the certificate authority; staying for
// another verdict would keep it, or a gateway that lost its database, from the
// way that works. Only a gateway gives verdicts, in a session of its own: an
// RCP ends a channel in any case when it likes.
func Leave(done, decided <-chan struct{}, end func(cause error)) {
	select {
	case <-done:
		return
	case <-decided:
	}
	answered := time.NewTimer(decidedGrace)
	defer answered.Stop()
	select {
	case <-done:
	case <-answered.C:
		end(errDecided)
	}
}

// LeaveFor ends the enrolment channel of a party without a certificate as soon
// as it has another join code, and returns when the channel has ended. Whoever
// waits for an operator, or was discarded, is asked again after minutes only;
// one that comes anew is asked at once.
func LeaveFor(done, another <-chan struct{}, end func(cause error)) {
	select {
	case <-done:
	case <-another:
		end(errAnother)
	}
}

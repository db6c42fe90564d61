package channel_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"testing"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
)

func TestFallback(t *testing.T) {
	var f channel.Fallback
	if f.Enroll() {
		t.Error("the first attempt is by the enrolment protocol")
	}
	for _, err := range []error{x509.UnknownAuthorityError{}, identity.ErrUntrusted, identity.ErrRevoked} {
		f.Note(channel.State{Err: fmt.Errorf("dial: %w", err), Failures: 1})
		if got := fmt.Sprint(f.Enroll(), f.Enroll(), f.Enroll(), f.Enroll()); got != "true false true false" {
			t.Errorf("%v: attempts by the enrolment protocol: %s", err, got)
		}
	}
	f.Note(channel.State{Conn: new(channel.Conn)})
	f.Note(channel.State{Err: identity.ErrRevoked})
	if f.Enroll() {
		t.Error("a connection that was cut is followed by one by the enrolment protocol")
	}
	for _, err := range []error{nil, errors.New("connection refused")} {
		f.Note(channel.State{Err: err, Failures: 2})
		if f.Enroll() {
			t.Errorf("after %v: by the enrolment protocol", err)
		}
	}
}

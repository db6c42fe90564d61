package node

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// rebirthPause lets the answer to a change of identity leave before the
// channels of the old one end.
const rebirthPause = 500 * time.Millisecond

var errReidentified = errors.New("this node has another identity now")

// takeReidentify makes the node another party, on a gateway's signed word that
// names this node and brings the join code of the new one. The code is on disk
// before the old identity goes.
func (in *instance) takeReidentify(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxEnrollBody, &env) {
		return
	}
	// Of two words that come at once the second finds that its node is gone: the
	// node would show one code, and the gateway that sent the other waits for it.
	in.rebirth.Lock()
	defer in.rebirth.Unlock()
	var q wire.Reidentify
	_, err := in.id.VerifyEnvelope(env, wire.TypeReidentify, wire.RoleGateway, &q)
	if err == nil {
		err = in.admitReidentify(&q)
	}
	if err != nil {
		in.log.Warn("change of identity refused", "reason", err)
		channel.Refuse(w, http.StatusForbidden, err.Error())
		return
	}
	old, former := in.id.ID(), in.upstreams.all()
	if err = in.join.Keep(q.Join); err == nil {
		err = in.id.Reidentify()
	}
	if err != nil {
		in.log.Error("identity not changed", "error", err)
		channel.Refuse(w, http.StatusInternalServerError, "reidentify: "+err.Error())
		return
	}
	in.quarantine.Store(false) // the other host has the one before
	in.log.Warn("a gateway gave this node another identity", "old", old, "id", in.id.ID(), "fingerprint", in.id.Fingerprint())
	w.WriteHeader(http.StatusNoContent)
	select {
	case in.reborn <- former:
	case <-r.Context().Done(): // they ended by themselves
	}
}

func (in *instance) admitReidentify(q *wire.Reidentify) error {
	boot := in.copies.boot(in.boot)
	switch {
	case q.Node != in.id.ID():
		return fmt.Errorf("reidentify: it is for node %s", wire.Quotable(string(q.Node)))
	case q.Boot != "" && q.Boot != boot:
		return fmt.Errorf("reidentify: it is for the process with boot ID %s, this is %s", wire.Quotable(q.Boot), boot)
	}
	if err := in.lock.obey(q.Installation); err != nil {
		return fmt.Errorf("reidentify: %w", err)
	}
	code, err := wire.ParseJoinCode(q.Join)
	if err != nil {
		return fmt.Errorf("reidentify: %w", err)
	}
	if code.Role != wire.RoleNode || code.TrustDomain != in.td {
		return fmt.Errorf("reidentify: the join code is for a %s of %s", code.Role, wire.Quotable(code.TrustDomain))
	}
	if err := in.id.Pin(code.Root, code.TrustDomain); err != nil { // a certified party pins nothing: it checks
		return fmt.Errorf("reidentify: %w", err)
	}
	return nil
}

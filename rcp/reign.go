package rcp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"sallyport/internal/atomicfile"
	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

const (
	fileReigns = "reigns.json"
	// maxReigns bounds the installations of one trust domain whose reigns are
	// kept: a database that was lost and made anew is another installation.
	maxReigns = 16
	// maxReign bounds one document on the wire and on disk, in bytes.
	maxReign = 64 << 10
)

// errReigns says that there is no room for another installation.
var errReigns = errors.New("this RCP holds the reigns of as many installations as it may")

// reigns are the newest signed reign of each installation: they outlive a
// restart, so that an old gateway that comes back is shown what it missed.
type reigns struct {
	file string

	mu   sync.Mutex
	held map[string]heldReign // by installation
}

type heldReign struct {
	wire.Reign
	Envelope wire.Envelope
}

// openReigns reads what is on disk. It was verified when it came; whoever is
// shown it verifies it again.
func openReigns(dir string) (*reigns, error) {
	r := &reigns{file: filepath.Join(dir, fileReigns), held: map[string]heldReign{}}
	b, err := os.ReadFile(r.file)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	var all []wire.Envelope
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("%s: %w (remove the file: gateways bring its content again)", r.file, err)
	}
	for _, env := range all {
		var reign wire.Reign
		if err := json.Unmarshal(env.Payload, &reign); err != nil {
			return nil, fmt.Errorf("%s: %w (remove the file: gateways bring its content again)", r.file, err)
		}
		r.held[reign.Installation] = heldReign{reign, env}
	}
	return r, nil
}

// take keeps a verified reign unless a newer one is held, and returns the one
// that is held then. began tells that it is another reign than before.
func (r *reigns) take(reign wire.Reign, env wire.Envelope) (held wire.Envelope, began bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old, known := r.held[reign.Installation]
	switch {
	case !known && len(r.held) >= maxReigns:
		return held, false, errReigns
	case known && (old.After(reign) || old.Mark().Same(reign.Mark()) && !reign.Issued.After(old.Issued)):
		return old.Envelope, false, nil
	}
	r.held[reign.Installation] = heldReign{reign, env}
	if err := r.save(); err != nil {
		r.held[reign.Installation] = old
		if !known {
			delete(r.held, reign.Installation)
		}
		return held, false, err
	}
	return env, known && reign.After(old.Reign), nil
}

func (r *reigns) save() error {
	all := make([]wire.Envelope, 0, len(r.held))
	for _, h := range r.held {
		all = append(all, h.Envelope)
	}
	slices.SortFunc(all, func(a, b wire.Envelope) int { return bytes.Compare(a.Payload, b.Payload) })
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	return atomicfile.WriteExactly(r.file, b, 0o600)
}

func (r *reigns) get(installation string) (wire.Envelope, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, ok := r.held[installation]
	return h.Envelope, ok
}

// marks are what the hello says.
func (r *reigns) marks() []wire.ReignMark {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []wire.ReignMark
	for _, h := range r.held {
		out = append(out, h.Mark())
	}
	slices.SortFunc(out, func(a, b wire.ReignMark) int { return bytes.Compare([]byte(a.Installation), []byte(b.Installation)) })
	return out
}

// takeReign keeps which state of its installation a gateway says goes on, and
// answers with the newest that is known. All gateways hear that there is a new
// one: the one that it replaces may be connected at this moment.
func (r *Relay) takeReign(w http.ResponseWriter, req *http.Request) {
	var env wire.Envelope
	if err := wire.DecodeJSON(req.Body, maxReign, &env); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "reign: "+err.Error())
		return
	}
	var reign wire.Reign
	peer, err := r.id.VerifyEnvelope(env, wire.TypeReign, wire.RoleGateway, &reign)
	if err == nil {
		err = checkReign(reign, peer.Party)
	}
	if err != nil {
		r.metrics.refuse(err)
		channel.Refuse(w, http.StatusUnprocessableEntity, "reign: "+err.Error())
		return
	}
	held, began, err := r.reigns.take(reign, env)
	if err != nil {
		channel.Refuse(w, http.StatusInsufficientStorage, "reign: "+err.Error())
		return
	}
	if began {
		r.log.Warn("a gateway was restored from a backup: every gateway is told, an older one stops itself", "installation", reign.Installation, "generation", reign.Generation)
		r.table.newReign()
	}
	channel.Answer(w, held)
}

// checkReign refuses what no gateway of ours writes.
func checkReign(reign wire.Reign, signer wire.Party) error {
	if _, err := wire.ParseID(reign.Installation); err != nil {
		return fmt.Errorf("installation: %w", err)
	}
	if reign.Gateway != signer.ID || reign.TrustDomain != signer.TrustDomain || reign.Generation < 1 || len(reign.Name) > maxBootText {
		return fmt.Errorf("%w: it is not what its signer, %s, may say", errForged, signer)
	}
	return nil
}

func (r *Relay) giveReign(w http.ResponseWriter, req *http.Request) {
	env, ok := r.reigns.get(req.PathValue("installation"))
	if !ok {
		channel.Refuse(w, http.StatusNotFound, "no reign of that installation is held here")
		return
	}
	channel.Answer(w, env)
}

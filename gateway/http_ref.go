package gateway

import (
	"context"
	"fmt"
	"strings"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// minHex is the number of hex digits of a UUID that name an object in a
// changing call. Reading calls take any unique beginning.
const minHex = 8

// pick finds the one item that a reference means: its ID, else its exact name,
// else a unique beginning. changing narrows what counts as a beginning.
func pick[T any](what, ref string, changing bool, items []T, names func(T) (id, name string)) (found T, err error) {
	var exact, begins []T
	for _, it := range items {
		id, name := names(it)
		switch {
		case ref == id && id != "":
			return it, nil
		case ref == name && name != "":
			exact = append(exact, it)
		case beginsWith(ref, id, name, changing):
			begins = append(begins, it)
		}
	}
	if len(exact) > 0 {
		begins = exact
	}
	switch len(begins) {
	case 1:
		return begins[0], nil
	case 0:
		return found, notFound(what, ref, changing)
	}
	seen := []string{}
	for _, it := range begins[:min(len(begins), 5)] {
		id, name := names(it)
		seen = append(seen, strings.TrimSpace(name+" "+wire.ID(id).Short()))
	}
	return found, api.NewProblem(api.CodeAmbiguous, fmt.Sprintf("%q may be any of %d: %s: say more of it", wire.Quotable(ref), len(begins), strings.Join(seen, ", ")))
}

func beginsWith(ref, id, name string, changing bool) bool {
	if ref == "" {
		return false
	}
	if changing {
		return hexDigits(ref) >= minHex && strings.HasPrefix(id, ref)
	}
	return strings.HasPrefix(id, ref) || strings.HasPrefix(name, ref)
}

// hexDigits counts the digits of the beginning of a UUID; 0 if it is none.
func hexDigits(s string) (n int) {
	for _, c := range s {
		switch {
		case '0' <= c && c <= '9' || 'a' <= c && c <= 'f':
			n++
		case c != '-':
			return 0
		}
	}
	return n
}

func notFound(what, ref string, changing bool) error {
	hint := ""
	if changing {
		hint = " (a change takes the exact name, the UUID, or at least 8 hex digits of it)"
	}
	return api.NewProblem(api.CodeNotFound, fmt.Sprintf("no %s %q%s", what, wire.Quotable(ref), hint))
}

// node finds the node that a reference means.
func (r *rest) node(ctx context.Context, ref string, changing bool) (*store.Node, error) {
	found, err := r.s.store.FindNodes(ctx, ref, 10)
	if err != nil {
		return nil, err
	}
	n, err := pick("node", ref, changing, found, func(n *store.Node) (string, string) { return string(n.ID), n.Name })
	if api.Is(err, api.CodeNotFound) && len(r.strangers(ref)) > 0 {
		return nil, api.NewProblem(api.CodeNotFound, fmt.Sprintf("node %s is locked (unknown): it has a certificate of ours, and this database does not know it; restore the database, enrol it again, or end its certificate with `sallyport node revoke`", wire.Quotable(ref)))
	}
	return n, err
}

// strangers are the nodes that a reference means and the database does not know.
func (r *rest) strangers(ref string) (out []api.Node) {
	for _, p := range r.s.fleet.strangers() {
		if v := strangerView(p); v.Name == ref || beginsWith(ref, string(v.ID), "", true) {
			out = append(out, v)
		}
	}
	return out
}

// rcp finds the RCP that a reference means.
func (r *rest) rcp(ctx context.Context, ref string, changing bool) (*store.RCP, error) {
	all, err := r.s.store.RCPs(ctx)
	if err != nil {
		return nil, err
	}
	return pick("rcp", ref, changing, all, func(p *store.RCP) (string, string) { return string(p.PartyID), p.Name })
}

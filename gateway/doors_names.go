package gateway

import (
	"context"
	"errors"
	"fmt"
	"path"

	"sallyport/config"
	"sallyport/gateway/store"
	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

// errDoorName says that a name is not certified.
var errDoorName = errors.New("the name is not certified here")

// doorNames says who may have a certificate for which name. Whoever answers
// for a node's side, the node itself above all, gets every name that its rules
// hold: they are what bounds a node that fell into wrong hands.
type doorNames struct {
	store *store.DB
	rules []doorRule
	own   string // of the doors themselves: nobody else is certified as it
}

type doorRule struct {
	config.NameRule
	selector selector.Selector // of rules that have one
}

func newDoorNames(db *store.DB, rules config.NameRules, own string) (*doorNames, error) {
	n := &doorNames{store: db, own: own}
	for _, r := range rules {
		rule := doorRule{NameRule: r}
		if r.Selector != "" {
			var err error
			if rule.selector, err = selector.Parse(r.Selector); err != nil {
				return nil, fmt.Errorf("%s: %w", r.Glob, err)
			}
		}
		n.rules = append(n.rules, rule)
	}
	return n, nil
}

// allow refuses a name, a host name in lower case or an address, that no rule
// holds. A rule with a selector holds for a node alone.
func (n *doorNames) allow(ctx context.Context, name string, node wire.ID) error {
	if err := n.free(name); err != nil {
		return err
	}
	var tags map[string]string
	for _, r := range n.rules {
		if ok, err := path.Match(r.Glob, name); err != nil || !ok {
			continue
		}
		if r.Selector == "" {
			return nil
		}
		if node == "" {
			continue
		}
		if tags == nil {
			var err error
			if tags, err = n.givenTags(ctx, node); err != nil {
				return err
			}
		}
		if r.selector.Matches(tags) {
			return nil
		}
	}
	return fmt.Errorf("%w: no rule of SALLYPORT_GATEWAY_DOORS_ALLOW holds %s", errDoorName, wire.Quotable(name))
}

// free refuses the name of the doors themselves: with it, a client could pose
// as them.
func (n *doorNames) free(name string) error {
	if name == n.own {
		return fmt.Errorf("%w: %s is the name of the doors themselves", errDoorName, name)
	}
	return nil
}

// givenTags are the tags of a node that it did not choose itself.
func (n *doorNames) givenTags(ctx context.Context, node wire.ID) (map[string]string, error) {
	rows, err := n.store.NodeTags(ctx, node)
	if err != nil {
		return nil, err
	}
	own := map[string]bool{}
	for _, t := range rows {
		if t.Source != store.TagNode {
			own[t.Key] = true
		}
	}
	tags := store.Effective(rows)
	for k := range tags {
		if !own[k] {
			delete(tags, k)
		}
	}
	return tags, nil
}

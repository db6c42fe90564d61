package store

import (
	"context"
	"fmt"
	"path"
	"regexp"

	"github.com/uptrace/bun"

	"sallyport/internal/wire"
)

// Sources of a tag, the strongest first.
const (
	TagGateway = "gateway" // set by an operator
	TagJoin    = "join"    // came with the join code
	TagNode    = "node"    // the node's own configuration
)

var tagStrength = map[string]int{TagGateway: 3, TagJoin: 2, TagNode: 1}

// NodeTag is one tag of one source. A hidden row of [TagGateway] takes a key
// away that a weaker source keeps setting.
type NodeTag struct {
	bun.BaseModel `bun:"table:node_tags"`
	NodeID        wire.ID `bun:",pk"`
	Key           string  `bun:",pk"`
	Source        string  `bun:",pk"`
	Value         string
	Hidden        bool
}

// Effective picks the strongest source of each key.
func Effective(rows []NodeTag) map[string]string {
	winner := map[string]NodeTag{}
	for _, t := range rows {
		if w, ok := winner[t.Key]; !ok || tagStrength[t.Source] > tagStrength[w.Source] {
			winner[t.Key] = t
		}
	}
	tags := make(map[string]string, len(winner))
	for k, t := range winner {
		if !t.Hidden {
			tags[k] = t.Value
		}
	}
	return tags
}

// Limits on tags.
const (
	maxTagKey   = 128
	maxTagValue = 256
)

// tagText is what selectors can name: no operators, commas or spaces.
var tagText = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]*$`)

// ValidTag refuses keys and values that a selector could not name.
func ValidTag(key, value string) error {
	switch {
	case !tagText.MatchString(key) || len(key) > maxTagKey:
		return fmt.Errorf("tag key %q: want letters, digits and . _ / -, beginning with a letter or digit, at most %d", wire.Quotable(key), maxTagKey)
	case value != "" && !tagText.MatchString(value) || len(value) > maxTagValue:
		return fmt.Errorf("tag %s: value %q: want letters, digits and . _ / -, beginning with a letter or digit, at most %d", key, wire.Quotable(value), maxTagValue)
	}
	return nil
}

// AllowsTag reports whether a node may set a tag itself: globs are over
// key=value, or over the key alone where they contain no "=". No glob allows
// everything.
func AllowsTag(globs []string, key, value string) bool {
	if len(globs) == 0 {
		return true
	}
	for _, g := range globs {
		for _, s := range []string{key, key + "=" + value} {
			if ok, err := path.Match(g, s); err == nil && ok {
				return true
			}
		}
	}
	return false
}

// NodeTags lists the tags of one node, of every source.
func (r Queries) NodeTags(ctx context.Context, id wire.ID) ([]NodeTag, error) {
	var out []NodeTag
	err := r.prepared.tags.Select(ctx, r.q, &out, id)
	return out, err
}

// AllTags returns the effective tags of every node.
func (r Queries) AllTags(ctx context.Context) (map[wire.ID]map[string]string, error) {
	var rows []NodeTag
	if err := r.q.NewSelect().Model(&rows).OrderExpr("node_id").Scan(ctx); err != nil {
		return nil, err
	}
	out := map[wire.ID]map[string]string{}
	for i := 0; i < len(rows); {
		j := i
		for j < len(rows) && rows[j].NodeID == rows[i].NodeID {
			j++
		}
		out[rows[i].NodeID] = Effective(rows[i:j])
		i = j
	}
	return out, nil
}

// SetJoinTags replaces the tags that came with the join code.
func (tx *Tx) SetJoinTags(ctx context.Context, id wire.ID, tags map[string]string) error {
	return tx.replaceTags(ctx, id, TagJoin, tags)
}

func (tx *Tx) replaceTags(ctx context.Context, id wire.ID, source string, tags map[string]string) error {
	if _, err := tx.prepared.clearTags.Exec(ctx, tx.q, id, source); err != nil {
		return err
	}
	for k, v := range tags {
		if err := tx.putTag(ctx, NodeTag{NodeID: id, Key: k, Source: source, Value: v}); err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) putTag(ctx context.Context, t NodeTag) error {
	_, err := tx.prepared.putTag.Exec(ctx, tx.q, &t)
	return err
}

// TagNode sets and removes tags on behalf of an operator. Removing a key that
// the join code set deletes it; one that the node keeps setting is hidden.
func (tx *Tx) TagNode(ctx context.Context, id wire.ID, set map[string]string, remove []string) error {
	for k, v := range set {
		if err := tx.putTag(ctx, NodeTag{NodeID: id, Key: k, Source: TagGateway, Value: v}); err != nil {
			return err
		}
	}
	for _, k := range remove {
		if _, err := tx.q.NewRaw("DELETE FROM node_tags WHERE node_id = ? AND key = ? AND source = ?", id, k, TagJoin).Exec(ctx); err != nil {
			return err
		}
		if err := tx.putTag(ctx, NodeTag{NodeID: id, Key: k, Source: TagGateway, Hidden: true}); err != nil {
			return err
		}
	}
	return nil
}

// CopyGatewayTags gives a replacement the tags that the gateway set on the
// node that it replaces.
func (tx *Tx) CopyGatewayTags(ctx context.Context, from, to wire.ID) error {
	rows, err := tx.NodeTags(ctx, from)
	if err != nil {
		return err
	}
	for _, t := range rows {
		if t.Source == TagGateway {
			t.NodeID = to
			if err := tx.putTag(ctx, t); err != nil {
				return err
			}
		}
	}
	return nil
}

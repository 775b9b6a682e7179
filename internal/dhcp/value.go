package dhcp

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// hexKind is an option's value as bytes.
const hexKind = "hex"

// valueKinds are the other ways to write an option's value.
var valueKinds = map[string]confForm{
	"text": {}, "addresses": confAddresses, "flag": {kind: confFlag}, "domains": {kind: confDomains, array: true},
	"uint8": {kind: confNumber, bytes: 1, array: true}, "uint16": {kind: confNumber, bytes: 2, array: true},
	"uint32": {kind: confNumber, bytes: 4, array: true}, "int32": {kind: confNumber, bytes: 4, signed: true, array: true},
}

// ValueKinds are the ways to write an option's value, by their names.
func ValueKinds() []string {
	return slices.Sorted(slices.Values(append(slices.Collect(maps.Keys(valueKinds)), hexKind)))
}

// ParseOption is an option's value as it stands in Options.More. kind is one of
// ValueKinds; empty, it is what RFC 2132 says of the option, if it says something. A
// value of a form that an option can't have is an error, whatever kind says.
func ParseOption(code uint8, kind string, words []string) ([]byte, error) {
	wrong := func(format string, a ...any) ([]byte, error) {
		return nil, fmt.Errorf("option %d: %w: %w", code, fmt.Errorf(format, a...), errdefs.ErrInvalidArgument)
	}
	if slices.Contains(ours, code) {
		return wrong("the server itself decides about it")
	}
	known, is := formOf(code)
	form, named := valueKinds[kind]
	switch {
	case kind == "" && !is:
		return wrong("nothing is known of its form: it needs a type, %s", strings.Join(ValueKinds(), ", "))
	case kind == "":
		form = known
	case !named && kind != hexKind:
		return wrong("type %q is none of %s", kind, strings.Join(ValueKinds(), ", "))
	}
	var value []byte
	ok := false
	if kind == hexKind {
		value, ok = parseHex(words)
	} else {
		all := make([]confWord, len(words))
		for i, w := range words {
			all[i] = confWord{text: w, quoted: form.kind == confText || w == ","}
		}
		value, ok = form.value(all)
	}
	if !ok || len(value) == 0 {
		return wrong("%q is not %s", strings.Join(words, ", "), form.describe(kind == hexKind))
	}
	if is && !known.fits(code, value) {
		return wrong("it has to be %s (RFC 2132), and this has %d bytes", known.describe(false), len(value))
	}
	return value, nil
}

// formOf is how an option that dhcpd has a name for is written.
func formOf(code uint8) (confForm, bool) {
	for _, t := range confTypes {
		if t.code == code {
			return t.form, true
		}
	}
	return confForm{}, false
}

// parseHex reads bytes, with colons between them or without.
func parseHex(words []string) ([]byte, bool) {
	if len(words) != 1 {
		return nil, false
	}
	if strings.Contains(words[0], ":") {
		return octets(confWord{text: words[0]})
	}
	b, err := hex.DecodeString(words[0])
	return b, err == nil
}

// describe says how a value is written.
func (f confForm) describe(bytes bool) string {
	one, many := "a text", "texts"
	switch {
	case bytes:
		return "bytes, such as 0a:00:01"
	case f.kind == confAddress:
		one, many = "an IPv4 address", "IPv4 addresses"
	case f.kind == confFlag:
		one = "true or false"
	case f.kind == confDomains:
		many = "names, such as lab.example.org"
	case f.kind == confNumber:
		low, high := f.limits()
		one, many = fmt.Sprintf("a number from %d to %d", low, high), fmt.Sprintf("numbers from %d to %d", low, high)
	}
	if f.array {
		return many
	}
	return one
}

// fits says whether bytes can be the value of an option that has this form.
func (f confForm) fits(code uint8, b []byte) bool {
	unit := 1
	switch {
	case code == optionPolicyFilter || code == optionStaticRoutes: // pairs
		unit = 8
	case f.kind == confAddress:
		unit = 4
	case f.kind == confNumber:
		unit = f.bytes
	case f.kind == confFlag:
		return len(b) == 1 && b[0] <= 1
	case f.kind == confText || f.kind == confDomains:
		return len(b) > 0
	}
	return len(b) > 0 && len(b)%unit == 0 && (f.array || len(b) == unit)
}

package dhcp

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// optionType is an option's number, and how dhcpd.conf(5) writes it: ip, text,
// data (a text, or bytes like 0a:01), bool, a number of 1, 2 or 4 bytes; with a
// star where there may be many.
type optionType struct {
	code byte
	kind string
}

// optionTypes are the options of dhcp-options(5) that people set.
var optionTypes = map[string]optionType{
	"subnet-mask": {1, "ip"}, "time-offset": {2, "4"}, "routers": {3, "ip*"}, "time-servers": {4, "ip*"}, "ien116-name-servers": {5, "ip*"},
	"domain-name-servers": {6, "ip*"}, "log-servers": {7, "ip*"}, "cookie-servers": {8, "ip*"}, "lpr-servers": {9, "ip*"},
	"host-name": {12, "data"}, "boot-size": {13, "2"}, "domain-name": {15, "text"}, "swap-server": {16, "ip"}, "root-path": {17, "text"},
	"ip-forwarding": {19, "bool"}, "max-dgram-reassembly": {22, "2"}, "default-ip-ttl": {23, "1"}, "interface-mtu": {26, "2"},
	"all-subnets-local": {27, "bool"}, "broadcast-address": {28, "ip"}, "router-discovery": {31, "bool"}, "static-routes": {33, "ip*"},
	"arp-cache-timeout": {35, "4"}, "default-tcp-ttl": {37, "1"}, "tcp-keepalive-interval": {38, "4"}, "nis-domain": {40, "text"},
	"nis-servers": {41, "ip*"}, "ntp-servers": {42, "ip*"}, "vendor-encapsulated-options": {43, "data"}, "netbios-name-servers": {44, "ip*"},
	"netbios-dd-server": {45, "ip*"}, "netbios-node-type": {46, "1"}, "netbios-scope": {47, "text"}, "font-servers": {48, "ip*"},
	"dhcp-lease-time": {51, "4"}, "dhcp-server-identifier": {54, "ip"}, "vendor-class-identifier": {60, "data"}, "dhcp-client-identifier": {61, "data"},
	"smtp-server": {69, "ip*"}, "tftp-server-name": {66, "text"}, "bootfile-name": {67, "text"}, "domain-search": {119, "names"},
	"tcode": {101, "text"}, "pcode": {100, "text"}, "vivso": {125, "data"}, "wpad": {252, "text"},
}

// encodeValue writes an option's values as they are sent.
func encodeValue(kind string, values [][]confWord) ([]byte, error) {
	one, many := strings.CutSuffix(kind, "*")
	if kind == "names" {
		return encodeNames(values)
	}
	if len(values) != 1 && !many {
		return nil, fmt.Errorf("it has one value, not %d: %w", len(values), errdefs.ErrInvalidArgument)
	}
	var b []byte
	for _, v := range values {
		if len(v) == 2 && one == "ip" && many { // static-routes: pairs without a comma between
			first, err := encodeOne(one, v[:1])
			if err != nil {
				return nil, err
			}
			b, v = append(b, first...), v[1:]
		}
		next, err := encodeOne(one, v)
		if err != nil {
			return nil, err
		}
		b = append(b, next...)
	}
	return b, nil
}

func encodeOne(kind string, v []confWord) ([]byte, error) {
	if len(v) != 1 {
		return nil, fmt.Errorf("it is no single value: %w", errdefs.ErrInvalidArgument)
	}
	word := v[0]
	switch kind {
	case "ip":
		ip, err := addressOf(v)
		if err != nil {
			return nil, err
		}
		return ip.AsSlice(), nil
	case "text", "data":
		if word.quoted {
			return []byte(word.text), nil
		}
		return hexOf(word.text)
	case "bool":
		switch strings.ToLower(word.text) {
		case "true", "on":
			return []byte{1}, nil
		case "false", "off":
			return []byte{0}, nil
		}
	case "1", "2", "4":
		size := int(kind[0] - '0')
		n, err := strconv.ParseInt(word.text, 0, 64)
		if err == nil && n >= -1<<(8*size-1) && n < 1<<(8*size) {
			b := make([]byte, size)
			for i := range b {
				b[i] = byte(n >> (8 * (size - 1 - i)))
			}
			return b, nil
		}
	}
	return nil, fmt.Errorf("%q is not of its type: %w", word.text, errdefs.ErrInvalidArgument)
}

// hexOf reads bytes like 1:a:ff.
func hexOf(s string) ([]byte, error) {
	var b []byte
	for part := range strings.SplitSeq(s, ":") {
		if len(part) == 1 {
			part = "0" + part
		}
		next, err := hex.DecodeString(part)
		if err != nil || len(next) != 1 {
			return nil, fmt.Errorf("%q is neither a text in quotes nor bytes: %w", s, errdefs.ErrInvalidArgument)
		}
		b = append(b, next...)
	}
	return b, nil
}

// encodeNames writes domain names (RFC 3397), without compression.
func encodeNames(values [][]confWord) ([]byte, error) {
	var b []byte
	for _, v := range values {
		if len(v) != 1 {
			return nil, fmt.Errorf("it is no list of names: %w", errdefs.ErrInvalidArgument)
		}
		for label := range strings.SplitSeq(strings.TrimSuffix(v[0].text, "."), ".") {
			if label == "" || len(label) > 63 {
				return nil, fmt.Errorf("%q is no name: %w", v[0].text, errdefs.ErrInvalidArgument)
			}
			b = append(append(b, byte(len(label))), label...)
		}
		b = append(b, 0)
	}
	return b, nil
}
